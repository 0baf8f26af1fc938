"""Files of llama.cpp: a LLaMA's weights, often quantized, its settings and tokenizer in one."""
