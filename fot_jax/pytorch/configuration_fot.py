"""Configuration of a Focused Transformer for `transformers`.

A LLaMA with memory layers has model_type "llama" and a LLaMA's own fields, so that LLaMA code reads
the same directory and passes the fields for memory over. Names of these are LongLLaMA's.
"""

from transformers import PretrainedConfig


class FotConfig(PretrainedConfig):
    """What determines the parameters and the function of a model.

    A LLaMA's fields, and:

    Args:
      local_context: the window, in tokens, after which positions start again at 0; None:
        max_position_embeddings.
      mem_layers: numbers of the layers with memory.
      mem_positionals: rotary positions on queries and keys of the window in memory layers; memory
        keys have none.
      mem_dtype: type that memory is kept in: "float32", "bfloat16" or "float16".
      mem_topk: memory keys that each query attends to, the best of each head; None: all.
      mem_scaling: queries of memory layers that see n tokens of memory are
        1 + mem_scaling * ln(1 + n / local_context) times as long.
      last_context_length: tokens of a longer input that stay in the window at its end.
      norm: "rmsnorm" or "layernorm".
      mlp: "swiglu" or "gelu".
      qk_norm: queries and keys have length 1, and each head a learned scale.
    """

    model_type = "fot"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        head_dim=None,
        max_position_embeddings=2048,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        rope_parameters=None,
        tie_word_embeddings=False,
        use_cache=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        local_context=None,
        mem_layers=(),
        mem_positionals=True,
        mem_dtype="bfloat16",
        mem_topk=None,
        mem_scaling=0.0,
        last_context_length=1024,
        norm="rmsnorm",
        mlp="swiglu",
        qk_norm=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        # transformers 5 has one object, rope_parameters, 4 had rope_theta and rope_scaling.
        rope = {"rope_theta": rope_theta, **(rope_scaling or rope_parameters or {})}
        rope["rope_type"] = rope.get("rope_type") or rope.pop("type", "default")
        if rope["rope_type"] not in ("default", "linear", "dynamic", "yarn", "llama3"):
            raise ValueError(f"rope scaling of type {rope['rope_type']!r} is not supported")
        if rope["rope_type"] in ("llama3", "yarn"):
            original = "original_max_position_embeddings"  # beside the object, or else in it
            rope.setdefault(original, max_position_embeddings)
            rope[original] = kwargs.get(original) or rope[original]
        self.rope_parameters = rope
        self.local_context = local_context or max_position_embeddings
        self.mem_layers = mem_layers
        self.mem_positionals = mem_positionals
        self.mem_dtype = mem_dtype
        self.mem_topk = mem_topk
        self.mem_scaling = mem_scaling
        self.last_context_length = last_context_length
        self.norm = norm
        self.mlp = mlp
        self.qk_norm = qk_norm
        self.use_cache = use_cache
        self.check()
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )

    def check(self):
        """Looks whether there are such memories; has their type and layers as JSON has them.

        Raises:
          ValueError: mem_dtype, mem_topk or mem_layers is none that there is.
        """
        self.mem_layers = list(self.mem_layers or ())
        self.mem_dtype = str(self.mem_dtype).removeprefix("torch.")
        if self.mem_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"mem_dtype = {self.mem_dtype!r}: choose float32, bfloat16 or float16")
        if self.mem_topk is not None and self.mem_topk < 1:
            raise ValueError(f"mem_topk = {self.mem_topk}: give 1 or more, or None for all")
        layers = self.num_hidden_layers
        if any(not 0 <= layer < layers for layer in self.mem_layers):
            raise ValueError(f"mem_layers = {self.mem_layers}: give numbers of {layers} layers")

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # What from_pretrained is given of memory passes the same checks as what is in the file:
        # transformers would set it afterwards.
        names = {"mem_dtype", "mem_layers", "mem_topk"} & kwargs.keys()
        given = {name: kwargs.pop(name) for name in names}
        return super().from_dict({**config_dict, **given}, **kwargs)


class FotLlamaConfig(FotConfig):
    """Of a model that is a LLaMA without its memory."""

    model_type = "llama"

    # (Said again, or transformers 5 would make one of its own.)
    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class FotMistralConfig(FotLlamaConfig):
    """Of one whose width is no multiple of its heads, which LlamaConfig of transformers 5 refuses.

    MistralConfig does not, and a Mistral without a sliding window computes the same.
    """

    model_type = "mistral"

    def __init__(self, sliding_window=None, **kwargs):
        self.sliding_window = None  # or saved without it, there would be one
        super().__init__(**kwargs)
