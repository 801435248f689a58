"""Pretrain GPT-2 in the Hugging Face ecosystem."""
