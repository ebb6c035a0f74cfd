"""Models built by other people's code, from a configuration: transformers and peft."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from .base import SEQ, VOCAB, Architecture, Inputs
from .sequence import GPT

# transformers computes its RMS norms, T5 norms and rotary angles in float32, whatever the model's dtype.
FLOAT32_INSIDE = 2e-5


def gpt2(attention: str) -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=VOCAB, n_positions=9, n_embd=8, n_layer=2, n_head=2, attn_implementation=attention,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1, use_cache=False,
        initializer_range=0.4,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config).train()


def llama(attention: str) -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=9, attn_implementation=attention, use_cache=False,
        bos_token_id=1, eos_token_id=1, pad_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).train()


def bert(attention: str) -> nn.Module:
    config = hf.BertConfig(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=9, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation=attention, pad_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    return hf.BertForMaskedLM(config).train()


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, dropout_rate=0.0, use_cache=False,
        pad_token_id=0, decoder_start_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config).train()


def lora() -> nn.Module:
    config = LoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["q", "kv", "head"], init_lora_weights=False
    )
    return get_peft_model(GPT("row"), config)  # type: ignore[arg-type]


def token_ids(batch: int, dtype: torch.dtype) -> Inputs:
    return (), {"input_ids": torch.randint(1, VOCAB, (batch, SEQ))}


def masked_token_ids(batch: int, dtype: torch.dtype) -> Inputs:
    lengths = torch.arange(batch) % 3 + 3
    mask = (torch.arange(SEQ) < lengths[:, None]).long()
    return (), {"input_ids": torch.randint(1, VOCAB, (batch, SEQ)), "attention_mask": mask}


def source_and_target(batch: int, dtype: torch.dtype) -> Inputs:
    source, target = torch.randint(1, VOCAB, (batch, SEQ + 2)), torch.randint(1, VOCAB, (batch, SEQ))
    return (), {"input_ids": source, "decoder_input_ids": target}


def logits(out: Any) -> Tensor:
    return out.logits


ARCHITECTURES = [
    *(
        Architecture(f"hf_gpt2_{kind}", lambda kind=kind: gpt2(kind), token_ids, logits, tokens=True)
        for kind in ("eager", "sdpa")
    ),
    *(
        Architecture(
            f"hf_llama_{kind}",
            lambda kind=kind: llama(kind),
            masked_token_ids,
            logits,
            tokens=True,
            either=("*norm.weight",),
            tolerance=FLOAT32_INSIDE,
        )
        for kind in ("eager", "sdpa")
    ),
    *(
        Architecture(f"hf_bert_{kind}", lambda kind=kind: bert(kind), masked_token_ids, logits, tokens=True)
        for kind in ("eager", "sdpa")
    ),
    Architecture(
        "hf_t5",
        t5,
        source_and_target,
        logits,
        unattributed={"*relative_attention_bias.weight": "rows are pairs of positions"},
        either=("*layer_norm.weight",),
        tolerance=FLOAT32_INSIDE,
    ),
    Architecture(
        "lora",
        lora,
        lambda batch, dtype: ((torch.randint(1, VOCAB, (batch, SEQ)),), {}),
        tokens=True,
    ),
]
