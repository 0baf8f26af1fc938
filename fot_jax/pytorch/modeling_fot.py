"""A Focused Transformer for `transformers`: a decoder whose memory layers read all of a long text.

Input longer than the local window is cut into windows, as LongLLaMA does it. Layers without memory
see their window alone; memory layers also, in the same softmax, the keys and values of all windows
before it. Positions start again at 0 in every window; keys in memory have none. This file is for
reading and writing text; training is done with fot_jax.

Letters: B rows, T new tokens, S keys, M tokens in memory, W tokens in the window, H heads, K key
and value heads, G = H / K, D head dim.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_fot import FotConfig, FotLlamaConfig, FotMistralConfig

TILE = 256  # queries at a time, times G: masks are made for a tile
SCORES = 2**26  # of queries and keys that are held at a time to find the best

# --- What has been read --------------------------------------------------------------------------


class LayerCache:
    """Keys and values of one layer: of the window and, in memory layers, of the memory.

    How much of the buffers is in use (`memory`, and `places` of the window) is FotCache's to know,
    as is how many tokens are `expected` in memory. If memory is of the type computed in, the
    window's keys stand behind it in the same buffer, so that both are attended to uncopied.
    """

    def __init__(self, remembers, dtype):
        self.remembers, self.dtype = remembers, dtype
        self.reset()

    def reset(self):
        """Forgets all."""
        self.window = None, None  # keys, values [B, K, W, D]
        self.plain = None  # keys as memory keeps them
        self.memory = None, None  # keys, values [B, K, M, D]

    def add(self, keys, values, plain, memory, places, expected):
        """Puts keys and values of T tokens behind the `places` in the window."""
        stop = places + keys.shape[2]
        if self.window[0] is not None:  # autocast may have begun or ended since
            kind = self.window[0].dtype
            keys, values, plain = (x.to(kind) for x in (keys, values, plain))
        self.window = _put(self.window, (keys, values), places, stop)
        if self.remembers:
            (self.plain,) = _put((self.plain,), (plain,), places, stop)
            if self.dtype == keys.dtype:
                at = memory + places, memory + stop
                self.memory = _put(self.memory, (keys, values), *at, expected)

    def seen(self, memory, places):
        """Keys and values of memory and window [B, K, M + W, D]."""
        k, v = (x[:, :, :places] for x in self.window)
        if not self.remembers or not memory:
            return k, v
        if self.dtype == k.dtype:
            return (x[:, :, : memory + places] for x in self.memory)
        memory_k, memory_v = (x[:, :, :memory].to(k.dtype) for x in self.memory)
        return torch.cat((memory_k, k), 2), torch.cat((memory_v, v), 2)

    def move(self, memory, places, expected):
        """Appends the window to memory."""
        if self.remembers:
            news = (x[:, :, :places].to(self.dtype) for x in (self.plain, self.window[1]))
            self.memory = _put(self.memory, tuple(news), memory, memory + places, expected)

    def change(self, change):
        """Changes every tensor."""
        self.window = tuple(None if x is None else change(x) for x in self.window)
        self.memory = tuple(None if x is None else change(x) for x in self.memory)
        self.plain = None if self.plain is None else change(self.plain)


def _put(buffers, news, start, stop, expected=0):
    """Puts tensors at start … stop of axis 2 of buffers, which grow where there is no room."""
    return tuple(
        _put_one(buffer, new, start, stop, expected)
        for buffer, new in zip(buffers, news, strict=True)
    )


def _put_one(buffer, new, start, stop, expected):
    if buffer is None or buffer.shape[2] < stop:
        room = max(stop, expected)
        if buffer is not None:
            room = max(room, min(2 * buffer.shape[2], stop + 2**16))
        larger = new.new_empty(*new.shape[:2], room, new.shape[3])
        if buffer is not None:
            larger[:, :, :start] = buffer[:, :, :start]
        buffer = larger
    elif buffer.is_inference() and not torch.is_inference_mode_enabled():
        buffer = buffer.clone()  # or torch would not let it be written to
    buffer[:, :, start:stop] = new
    return buffer


class FotCache(Cache):
    """What a model has read of each row: `model(..., past_key_values=FotCache(model.config))`.

    Reading on changes it; `copy.deepcopy` it first to ask several things of one text.
    """

    def __init__(self, config):
        dtype = getattr(torch, config.mem_dtype)
        self.layers = [
            LayerCache(i in config.mem_layers, dtype) for i in range(config.num_hidden_layers)
        ]
        self.context = config.local_context
        self.reset()

    def reset(self):
        """Forgets all that was read."""
        for layer in self.layers:
            layer.reset()
        self.places = 0  # of the window, in use
        self.memory = 0  # tokens in memory
        self.forgotten = 0  # tokens that have left the window
        self.visible = None  # [B, M + W], where there is padding

    def pieces(self, tokens, last):
        """How T tokens are cut: (start, stop, whether the window is emptied before).

        All but the last `last` are cut from the left into pieces of a window, then comes one piece
        with the rest. Read from the start, each is a window of its own; with tokens in the window
        already, a piece joins them where it fits.
        """
        before = tokens - min(tokens, last)
        bounds = [(i, min(i + self.context, before)) for i in range(0, before, self.context)]
        bounds.append((before, tokens))
        joins, places, pieces = self.places > 0, self.places, []
        for i, (start, stop) in enumerate(bounds):
            moves = places + stop - start > self.context if joins else i > 0
            places = stop - start + (0 if moves else places)
            pieces.append((start, stop, moves))
        return pieces

    def move(self, expected=0):
        """Empties the window: into memory in memory layers."""
        remembers = any(layer.remembers for layer in self.layers)
        for layer in self.layers:
            layer.move(self.memory, self.places, expected)
        if self.visible is not None and not remembers:
            self.visible = self.visible[:, :0]
        self.forgotten += self.places
        self.memory += self.places if remembers else 0
        self.places = 0

    def see(self, visible, rows, tokens, device):
        """Notes which of T new tokens are none of padding; None: all."""
        if visible is None and self.visible is None:
            return
        if self.visible is None:
            before = self.memory + self.places
            self.visible = torch.ones(rows, before, dtype=torch.bool, device=device)
        if visible is None:
            visible = torch.ones(rows, tokens, dtype=torch.bool, device=device)
        self.visible = torch.cat((self.visible, visible), 1)

    def hide(self, visible):
        """Notes which of all tokens so far, [B, tokens], are padding, beside those that were."""
        visible = visible[:, self.get_seq_length() - self.memory - self.places :]
        if self.visible is not None:
            visible = visible & self.visible.to(visible.device)
        if not visible.all():
            self.visible = visible

    # What `generate` asks of a cache.

    is_compileable = False
    is_croppable = False
    is_initialized = True
    is_sliding = [False]

    def __len__(self):
        return len(self.layers)

    def __repr__(self):
        return f"FotCache({self.memory} tokens in memory, {self.places} in the window)"

    def rows(self):
        """Texts side by side; None: nothing was read."""
        keys = self.layers[0].window[0]
        return None if keys is None else keys.shape[0]

    def get_seq_length(self, layer_idx=0):
        return self.forgotten + self.places

    def get_max_cache_shape(self, layer_idx=0):
        return -1

    def get_max_length(self, layer_idx=0):
        return -1

    def reorder_cache(self, beam_idx):
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices):
        self._change(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats):
        self._change(lambda x: x.repeat_interleave(repeats, 0))

    def crop(self, max_length):
        raise NotImplementedError("what has been read into memory cannot be taken back")

    def _change(self, change):
        for layer in self.layers:
            layer.change(change)
        if self.visible is not None:
            self.visible = change(self.visible)


# --- Attention -----------------------------------------------------------------------------------


def attend(q, k, v, visible, scale, topk=None, memory=0):
    """Softmax attention of T tokens at the end of S keys: [B, H, T, D].

    Args:
      q: [B, H, T, D].
      k, v: [B, K, S, D]; the last T are the queries' own.
      visible: [B, S], False for padding; None: all.
      topk: memory keys that a query attends to; None: all.
      memory: how many of the keys, the first ones, are in memory.
    """
    if topk is not None and memory > topk:
        return _best(q, k, v, visible, scale, topk, memory)
    if q.shape[1:3] == k.shape[1:3] and visible is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=scale)
    return _all(q, k, v, visible, scale)


def _tiles(q, k, visible, most=TILE):
    """Queries a tile at a time: (q [B, K, G * t, D], keys they see, mask [B or 1, 1, t, keys])."""
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    G = H // K
    step = max(1, min(most, TILE) // G)
    for start in range(0, T, step):
        stop = min(start + step, T)
        keys = S - T + stop
        mask = None
        if stop - start > 1 or visible is not None:
            at = torch.arange(keys, device=q.device)
            own = at[S - T + start :, None]  # [t, 1]
            mask = (at <= own)[None, None]
            if visible is not None:  # a token of padding sees itself, or it would see nothing
                mask = mask & visible[:, None, None, :keys] | (at == own)
        tile = q[:, :, start:stop].reshape(B, K, G * (stop - start), D)
        if mask is not None and G > 1:
            mask = mask.repeat(1, 1, G, 1)
        yield tile, keys, mask


def _all(q, k, v, visible, scale):
    """Attention to all keys."""
    out = []
    for tile, keys, mask in _tiles(q, k, visible):
        attended = F.scaled_dot_product_attention(
            tile, k[:, :, :keys], v[:, :, :keys], attn_mask=mask, scale=scale
        )
        out.append(attended.reshape(*q.shape[:2], -1, q.shape[3]))
    return torch.cat(out, 2) if len(out) > 1 else out[0]


def _best(q, k, v, visible, scale, topk, memory):
    """Attention to the best keys of memory for each query and head, and to the window."""
    k, out = k.float(), []
    most = SCORES // (k.shape[0] * k.shape[1] * k.shape[2])
    for tile, keys, mask in _tiles(q, k, visible, most):
        scores = torch.matmul(tile.float(), k[:, :, :keys].mT) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        best, where = scores[..., :memory].topk(topk, -1)
        weights = torch.cat((best, scores[..., memory:]), -1).softmax(-1)
        rows = torch.arange(v.shape[0], device=v.device)[:, None, None, None]
        heads = torch.arange(v.shape[1], device=v.device)[:, None, None]
        values = v[rows, heads, where].float()  # [B, K, queries, topk, D]
        attended = torch.einsum("bkns,bknsd->bknd", weights[..., :topk], values)
        attended = attended + weights[..., topk:] @ v[:, :, memory:keys].float()
        out.append(attended.to(q.dtype).reshape(*q.shape[:2], -1, q.shape[3]))
    return torch.cat(out, 2)


# --- Layers --------------------------------------------------------------------------------------


class Norm(nn.Module):
    """RMSNorm or LayerNorm, in float32."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.centred = config.norm == "layernorm"
        if self.centred:
            self.bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.epsilon = config.rms_norm_eps

    def forward(self, x):
        y = x.float()
        if self.centred:
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.epsilon) * self.weight
        return (y + self.bias if self.centred else y).to(x.dtype)


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.mlp == "swiglu"
        if self.gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        if self.gated:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        c = config
        self.layer, self.head_dim = layer, c.head_dim
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.remembers = layer in c.mem_layers
        self.rotates = c.mem_positionals or not self.remembers
        self.topk = c.mem_topk if self.remembers else None
        self.scaling, self.window = c.mem_scaling, c.local_context
        self.q_proj = nn.Linear(c.hidden_size, self.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=False)
        self.scale = c.head_dim**-0.5
        self.log_scale = None
        if c.qk_norm:
            self.log_scale = nn.Parameter(torch.full((self.heads,), math.log(10.0)))
            self.scale = 1.0
        if self.rotates:
            self.scale *= attention_factor(c) ** 2

    def forward(self, x, rope, cache, expected):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.log_scale is not None:
            q = (_unit(q).float() * self.log_scale.float().exp()[:, None, None]).to(q.dtype)
            k = _unit(k)
        plain = k
        memory = cache.memory if self.remembers else 0
        if memory and self.scaling:
            q = (q.float() * self._longer(cache.visible, memory, q)).to(q.dtype)
        if self.rotates:
            q, k = rotate(q, rope), rotate(k, rope)
        layer = cache.layers[self.layer]
        layer.add(k, v, plain, memory, cache.places, expected)
        k, v = layer.seen(memory, cache.places + T)
        visible = cache.visible
        if visible is not None:
            visible = visible[:, -k.shape[2] :].to(k.device)
        attended = attend(q.to(k.dtype), k, v, visible, self.scale, self.topk, memory)
        return self.o_proj(attended.to(q.dtype).transpose(1, 2).reshape(B, T, -1))

    def _longer(self, visible, memory, q):
        """What queries of each row are multiplied by for so many tokens in memory."""
        tokens = torch.tensor(memory, device=q.device)
        if visible is not None:
            tokens = visible[:, :memory].sum(1).to(q.device).view(-1, 1, 1, 1)
        return 1 + self.scaling * torch.log1p(tokens.float() / self.window)


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = Mlp(config)
        self.input_layernorm = Norm(config)
        self.post_attention_layernorm = Norm(config)

    def forward(self, x, rope, cache, expected):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, expected)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config)

    def forward(self, x, rope, cache, expected):
        """Reads a piece [B, T, hidden] behind what is in the window."""
        for layer in self.layers:
            x = layer(x, rope, cache, expected)
        cache.places += x.shape[1]
        return self.norm(x)


def _unit(x):
    y = x.float()
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rope_table(config):
    """Cosine and sine of the positions of a window: two [W, D / 2] float32, from float64 angles."""
    D = config.head_dim
    s = config.rope_parameters
    frequencies = s["rope_theta"] ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    if s["rope_type"] == "linear":
        frequencies = frequencies / s["factor"]
    if s["rope_type"] in ("llama3", "yarn"):
        original, factor = s["original_max_position_embeddings"], s.get("factor")
        if s["rope_type"] == "llama3":
            turns = original * frequencies / (2 * math.pi)
            keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        else:
            low, high = (  # pairs of dimensions that turn so often in the original window
                D / 2 * math.log(original / (2 * math.pi * turns)) / math.log(s["rope_theta"])
                for turns in (s.get("beta_fast") or 32, s.get("beta_slow") or 1)
            )
            if s.get("truncate", True):
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, D - 1)
            keep = 1 - (torch.arange(D // 2, dtype=torch.float64) - low) / (high - low or 0.001)
            factor = factor or config.max_position_embeddings / original
        keep = keep.clamp(0, 1)
        frequencies = frequencies * (keep + (1 - keep) / factor)
    positions = torch.arange(config.local_context, dtype=torch.float64)
    angles = torch.outer(positions, frequencies)
    return angles.cos().float(), angles.sin().float()


def attention_factor(config):
    """What YaRN multiplies queries and keys with."""
    s = config.rope_parameters
    if s["rope_type"] != "yarn":
        return 1.0
    if s.get("attention_factor") is not None:
        return s["attention_factor"]
    factor = s.get("factor")
    factor = factor or config.max_position_embeddings / s["original_max_position_embeddings"]
    log, of, of_all = 0.1 * math.log(max(factor, 1)), s.get("mscale"), s.get("mscale_all_dim")
    return (of * log + 1) / (of_all * log + 1) if of and of_all else log + 1


def rotate(x, rope):
    """Rotary positions of x [B, H, T, D], in float32."""
    cos, sin = rope
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


# --- Model ---------------------------------------------------------------------------------------


class FotForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model that reads texts of any length."""

    config_class = FotConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ["Layer"]
    _supports_sdpa = True
    _is_stateful = True  # what is read into memory cannot be taken back
    _supports_cache_class = True  # asked by transformers before 4.56
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        config.check()  # again, as it may have been changed
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._rope = {}  # by device
        if config.qk_norm:
            self._keep_in_fp32_modules_strict = {"log_scale"}
        self.post_init()

    def _init_weights(self, module):
        # (By these functions, which transformers 5.0 keeps away from weights that were loaded.)
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0.0, self.config.initializer_range)
        elif isinstance(module, Norm):
            nn.init.ones_(module.weight)
            if module.centred:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Attention) and module.log_scale is not None:
            nn.init.constant_(module.log_scale, math.log(10.0))

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    @torch.no_grad()
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        last_context_length=None,
        logits_to_keep=0,
        return_dict=None,
        **kwargs,
    ):
        """Reads T tokens, window by window; nothing of it can be differentiated.

        Args:
          input_ids: [B, T], of any length; or inputs_embeds [B, T, hidden].
          attention_mask: [B, T] or [B, all tokens so far], which may hide what has been read; 0 for
            padding, which takes a place of its window. Positions are places in the window:
            position_ids are passed over.
          past_key_values: a FotCache, which changes.
          labels: [B, T], -100 where there is none, for the loss: the mean, or the sum divided by
            `num_items_in_batch`.
          last_context_length: tokens that stay in the window at the end, at most the local
            window; None: as in the configuration, or of a model without memory all that fit; of a
            text that does not, read to write on (logits_to_keep = 1), half a window.
          logits_to_keep: logits of the last so many tokens are wanted; 0: of all.
          use_cache: whether the cache is returned; None: as in the configuration.
        """
        if self.training:
            kind = self.config.model_type
            raise ValueError(
                "this model only reads and writes: call eval(), or train with fot_jax"
                + f", or train it without memory as a {kind.title()}ForCausalLM" * (kind != "fot")
            )
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            raise ValueError("attentions and hidden states of windows are not kept")
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = x.shape
        cache = self._cache(past_key_values)
        if not T:
            raise ValueError("no tokens: give at least one")
        if cache.rows() not in (None, B):
            raise ValueError(f"{B} rows for a cache of {cache.rows()}: batch_repeat_interleave it")
        visible = self._visible(attention_mask, cache, T)
        window = self.config.local_context
        last = last_context_length
        use_cache = self.config.use_cache if use_cache is None else use_cache
        kept = T if isinstance(logits_to_keep, torch.Tensor) else logits_to_keep or T
        if last is None and not self.config.mem_layers:  # what leaves the window is lost
            writes = kept == 1 and use_cache and cache.places + T > window
            last = window - (window // 2 if writes else 0)
        if last is None:
            last = min(window, self.config.last_context_length)
        if not 1 <= last <= window:
            raise ValueError(f"last_context_length = {last}: give 1 to {window}, the local window")
        rope = self._rope_on(x.device)
        pieces = cache.pieces(T, last)
        expected = cache.memory + cache.places + T
        hidden = []
        for start, stop, moves in pieces:
            if moves:
                cache.move(expected)
            of_piece = None if visible is None else visible[:, start:stop]
            cache.see(of_piece, B, stop - start, x.device)
            at = slice(cache.places, cache.places + stop - start)
            of_window = self.model(x[:, start:stop], [t[at] for t in rope], cache, expected)
            if stop > T - kept:
                hidden.append(of_window[:, max(0, T - kept - start) :])
        hidden = torch.cat(hidden, 1) if len(hidden) > 1 else hidden[0]
        if isinstance(logits_to_keep, torch.Tensor):
            hidden = hidden[:, logits_to_keep]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        out = CausalLMOutputWithPast(loss, logits, cache if use_cache else None)
        return out.to_tuple() if return_dict is False else out

    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        """As of transformers. Of a model without memory the window has room for what is written.

        There is always a cache: read anew for each token, the text would be cut into other windows.
        """
        if generation_config is None:
            kwargs["use_cache"] = True
        else:  # beside which transformers warns of settings that are given by themselves
            generation_config = copy.deepcopy(generation_config)
            generation_config.use_cache = True
            kwargs.pop("use_cache", None)
        if not self.config.mem_layers and kwargs.get("last_context_length") is None:
            window, how = self.config.local_context, generation_config or self.generation_config
            given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            prompt = next((x.shape[1] for x in given if x is not None), 1)
            new, longest = (
                kwargs.get(name, getattr(how, name)) for name in ("max_new_tokens", "max_length")
            )
            if new is None:
                new = window if longest is None else longest - prompt
            kwargs["last_context_length"] = max(1, window - min(max(new, 0), window // 2))
        return super().generate(inputs, generation_config, *args, **kwargs)

    def _cache(self, cache):
        if cache is None:
            return FotCache(self.config)
        if not isinstance(cache, FotCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}: give a FotCache")
        return cache

    def _visible(self, mask, cache, tokens):
        """Which of the new tokens are none of padding, [B, T]; None: all.

        A mask of all tokens so far is noted for those in the cache, too.
        """
        if mask is None:
            return None
        if mask.dim() != 2:
            raise ValueError(f"attention_mask of shape {tuple(mask.shape)}: give [rows, tokens]")
        if mask.shape[1] < tokens:
            raise ValueError(f"attention_mask of {mask.shape[1]} tokens for {tokens}: give all")
        if mask.shape[1] == cache.get_seq_length() + tokens:
            cache.hide(mask[:, :-tokens].bool())
        visible = mask[:, -tokens:].bool()
        return None if visible.all() else visible

    def _rope_on(self, device):
        if device not in self._rope:
            self._rope[device] = [x.to(device) for x in rope_table(self.config)]
        return self._rope[device]

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if seen == 0 and past_key_values is not None and not isinstance(past_key_values, FotCache):
            past_key_values = FotCache(self.config)  # in place of the one that generate made
        if inputs_embeds is not None and seen == 0:
            inputs = {"inputs_embeds": inputs_embeds}
        else:
            new = given = input_ids.shape[1]
            if kwargs.get("next_sequence_length") is not None:  # transformers 5; None: all
                new = kwargs["next_sequence_length"]
            elif "next_sequence_length" not in kwargs and attention_mask is not None:
                new = attention_mask.shape[1] - seen  # (of a chunk without padding there is none)
            if not 0 < new <= given:
                raise ValueError(
                    f"{given} tokens where {seen} have been read: give the whole text, what was "
                    "read and at least one token more, or what is new with attention_mask of all"
                )
            if kwargs.get("next_sequence_length") == 1 and not kwargs.get("is_first_iteration"):
                attention_mask = None  # of what we wrote; to ask for 0s would wait for the device
            inputs = {"input_ids": input_ids[:, -new:]}
        for name in ("use_cache", "logits_to_keep", "last_context_length"):
            if name in kwargs:
                inputs[name] = kwargs[name]
        inputs |= {"past_key_values": past_key_values, "attention_mask": attention_mask}
        if self.device.type == "meta":  # where the weights are on disk
            return inputs
        return {n: x.to(self.device) if torch.is_tensor(x) else x for n, x in inputs.items()}


class FotLlamaForCausalLM(FotForCausalLM):
    """A model that is a LLaMA without its memory."""

    config_class = FotLlamaConfig


class FotMistralForCausalLM(FotLlamaForCausalLM):
    config_class = FotMistralConfig
