"""Reads the text side of transformers' CLIP models, and of open_clip's that have an encoder of transformers.

    CLIP, MetaCLIP 2, SigLIP, CLIPSeg   norms before attention and MLP; the EOS or the last token
    BERT, RoBERTa                       norms behind them; the first token or the mean of all (Chinese CLIP, AltCLIP,
                                        open_clip's roberta and xlm-roberta)
    M2M-100                             norms before; sinusoidal positions (open_clip's nllb)
    mT5                                 RMS norms before; relative positions as a bias, products that are not scaled

Each `_read_*` knows an encoder by its parts' names. As in `hf`, fused queries, keys and values are a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from clipfast.models.block import Block
from clipfast.models.hf import below, inner, linear, parts, read_act, read_attention, read_layers
from clipfast.models.layers import Affine, Chain, Gated, Norm, Residual, Stage
from clipfast.models.openclip import read_logit_scale, read_norm, read_weight, unsupported
from clipfast.models.tail import Tail
from clipfast.models.text import Embedding, Pooling, TextTower

# What mT5 was trained on; its relative positions themselves know no end.
_T5_CONTEXT = 512


@dataclass(frozen=True)
class Encoder:
    """Blocks and embedding of a text encoder. norm: of every token above the blocks. bias: as in `TextTower`."""

    blocks: list[Block]
    embedding: Embedding
    context_length: int
    norm: Norm | None = None
    bias: Callable[[int], Tensor] | None = None


@dataclass(frozen=True)
class RelativeBias:
    """T5's position bias: table (buckets, H), of which half are for tokens ahead, each half by growing distances.

    Raffel et al., JMLR 2020, section 2.1; distances from half of a half on share buckets logarithmically, and from
    `furthest` on the last one.
    """

    table: Tensor
    furthest: int

    def __call__(self, length: int) -> Tensor:
        """What is added to products of queries and keys: (1, H, length, length)."""
        places = torch.arange(length, device=self.table.device)
        away = places - places[:, None]
        half = len(self.table) // 2
        exact = half // 2
        distance = away.abs()
        # Not below one, whose logarithm nothing needs.
        growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.furthest / exact)
        far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
        buckets = torch.where(distance < exact, distance, far) + half * (away > 0)
        return self.table[buckets].permute(2, 0, 1)[None]


def text_tower(module: nn.Module, dtype: torch.dtype | None = None) -> TextTower:
    """The text side of a model of transformers with a `text_model`.

    dtype: the trunk's; None keeps the weights as they are. Raises ModelError naming the part that does not fit.
    """
    t, where = inner(module, "text_model")
    projection = getattr(module, "text_projection", None)
    head: list[Stage] = [] if projection is None else [linear(projection, "text_projection")]
    if hasattr(t, "roberta"):
        parts(t, where, "roberta", "pre_LN", "transformation")
        head = [read_norm(t.pre_LN, f"{where}.pre_LN"), linear(t.transformation, f"{where}.transformation"), *head]
        t, where = t.roberta, f"{where}.roberta"
    if hasattr(getattr(t, "embeddings", None), "word_embeddings"):
        return _tower(module, _read_bert(t, where, dtype), head, "first", dtype, padding=t.config.pad_token_id)
    parts(t, where, "embeddings", "encoder", "final_layer_norm", optional=("head",))
    own: Any = getattr(t, "head", None)
    if own is not None:
        # SigLIP's texts are padded to one length, and its model was trained to see the padding.
        return _tower(module, _read_clip(t, where, dtype), [linear(own, f"{where}.head"), *head], "last", dtype)
    eot_id = int(t.config.eos_token_id)
    # Configurations of CLIP's from before 2023 say 2, whatever the vocabulary; MetaCLIP 2's is 2.
    legacy = eot_id == 2 and "metaclip" not in t.config.model_type
    pool: Pooling = "argmax" if legacy else "eos"
    return replace(_tower(module, _read_clip(t, where, dtype), head, pool, dtype), causal=True, eot_id=eot_id)


def encoder_tower(module: nn.Module, dtype: torch.dtype | None = None) -> TextTower:
    """The text side of an open_clip model whose `text` is its HFTextEncoder. Raises ModelError as `text_tower` does."""
    text: Any = getattr(module, "text", None)
    t, where = text.transformer, "text.transformer"
    pooler = type(text.pooler).__name__
    head: list[Stage] = []
    for i, stage in enumerate(text.proj if isinstance(text.proj, nn.Sequential) else [text.proj]):
        if not isinstance(stage, nn.Identity):
            path = f"text.proj.{i}"
            head.append(linear(stage, path) if hasattr(stage, "weight") else read_act(stage, path))
    if hasattr(t, "block"):
        encoder = _read_t5(t, where, dtype)
    elif hasattr(t, "embed_positions"):
        encoder = _read_m2m(t, where, dtype)
    elif hasattr(getattr(t, "embeddings", None), "word_embeddings"):
        encoder = _read_bert(t, where, dtype)
    else:
        raise unsupported(f"{where} ({type(t).__name__})", "is no BERT, RoBERTa, M2M-100 or T5 encoder")
    if pooler == "MeanPooler":
        pool: Pooling = "mean"
    elif pooler in ("ClsPooler", "ClsLastHiddenStatePooler"):
        pool = "first"
        if getattr(text.pooler, "use_pooler_output", False) and (own := getattr(t, "pooler", None)) is not None:
            parts(own, f"{where}.pooler", "dense", optional=("activation",))
            act = read_act(own.activation, f"{where}.pooler.activation")
            head = [linear(own.dense, f"{where}.pooler.dense"), act, *head]
    else:
        raise unsupported(f"text.pooler ({pooler})", "is not the mean of all tokens or the first one")
    if encoder.bias is not None and pool != "mean":
        raise unsupported(f"text.pooler ({pooler})", "pools one token of blocks with relative positions")
    return _tower(module, encoder, head, pool, dtype, padding=text.config.pad_token_id)


def _tower(
    module: nn.Module,
    encoder: Encoder,
    head: list[Stage],
    pool: Pooling,
    dtype: torch.dtype | None,
    padding: int | None = None,
) -> TextTower:
    blocks, norm = encoder.blocks, encoder.norm
    if norm is not None and pool == "mean":
        # It acts on every token before their mean.
        own = norm if dtype is None else norm.to(dtype)
        blocks = [*blocks[:-1], replace(blocks[-1], rest=blocks[-1].rest + Chain((own,)))]
        norm = None
    return TextTower(
        blocks=blocks,
        tail=Tail.above(blocks[-1], *([] if norm is None else [norm]), *head),
        causal=False,
        logit_scale=read_logit_scale(module),
        embedding=encoder.embedding,
        context_length=encoder.context_length,
        pool=pool,
        padding=padding,
        bias=encoder.bias,
    )


def _read_clip(t: Any, where: str, dtype: torch.dtype | None) -> Encoder:
    e = t.embeddings
    parts(e, f"{where}.embeddings", "token_embedding", "position_embedding")
    embedding = Embedding(read_weight(e.token_embedding.weight), read_weight(e.position_embedding.weight))
    norm = read_norm(t.final_layer_norm, f"{where}.final_layer_norm")
    return Encoder(read_layers(t.encoder, f"{where}.encoder", dtype), embedding, len(e.position_embedding.weight), norm)


def _read_bert(t: Any, where: str, dtype: torch.dtype | None) -> Encoder:
    """BERT and RoBERTa: embeddings with a norm, and norms behind each residual connection. A pooler is the caller's."""
    parts(t, where, "embeddings", "encoder", optional=("pooler",))
    e, path = t.embeddings, f"{where}.embeddings"
    parts(e, path, "word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
    if getattr(t.config, "is_decoder", False) or getattr(t.config, "position_embedding_type", "absolute") != "absolute":
        raise unsupported(where, "is a decoder, or its positions are relative")
    # Texts are all of the first type, which thus is a part of every position.
    positions = read_weight(e.position_embeddings.weight) + read_weight(e.token_type_embeddings.weight)[0]
    # RoBERTa counts from the position behind padding's on, and counts no padding.
    uncounted = e.position_embeddings.padding_idx
    if uncounted is not None:
        positions = positions[uncounted + 1 :]
    norm = read_norm(e.LayerNorm, f"{path}.LayerNorm")
    layers = getattr(t.encoder, "layer", None) or getattr(t.encoder, "layers", None)
    if not layers:
        raise unsupported(f"{where}.encoder", "has no blocks called 'layer' or 'layers'")
    blocks = [_read_bert_layer(layer, f"{where}.encoder.layer.{i}", dtype) for i, layer in enumerate(layers)]
    embedding = Embedding(read_weight(e.word_embeddings.weight), positions, norm=norm, uncounted=uncounted)
    return Encoder(blocks, embedding, len(positions))


def _read_bert_layer(layer: Any, path: str, dtype: torch.dtype | None) -> Block:
    parts(layer, path, "attention", "intermediate", "output")
    attention, middle, output = layer.attention, layer.intermediate, layer.output
    parts(attention, f"{path}.attention", "self", "output")
    parts(attention.output, f"{path}.attention.output", "dense", "LayerNorm")
    parts(middle, f"{path}.intermediate", "dense", optional=("intermediate_act_fn",))
    parts(output, f"{path}.output", "dense", "LayerNorm")
    attn, names = attention.self, ("query", "key", "value")
    parts(attn, f"{path}.attention.self", *names)
    q, k, v = (linear(getattr(attn, name), f"{path}.attention.self.{name}", dtype) for name in names)
    mlp = (
        linear(middle.dense, f"{path}.intermediate.dense", dtype),
        read_act(middle.intermediate_act_fn, f"{path}.intermediate.intermediate_act_fn"),
        linear(output.dense, f"{path}.output.dense", dtype),
    )
    return Block(
        heads=attn.num_attention_heads,
        norm1=Chain(),
        qkv=below(q, k, v),
        branch=Chain((linear(attention.output.dense, f"{path}.attention.output.dense", dtype),)),
        rest=Chain(
            (
                read_norm(attention.output.LayerNorm, f"{path}.attention.output.LayerNorm", dtype),
                Residual(Chain(mlp)),
                read_norm(output.LayerNorm, f"{path}.output.LayerNorm", dtype),
            )
        ),
    )


def _read_m2m(t: Any, where: str, dtype: torch.dtype | None) -> Encoder:
    parts(t, where, "embed_tokens", "embed_positions", "layers", "layer_norm")
    uncounted = t.embed_positions.padding_idx
    embedding = Embedding(
        read_weight(t.embed_tokens.weight),
        read_weight(t.embed_positions.weights)[uncounted + 1 :],
        scale=float(getattr(t.embed_tokens, "embed_scale", 1.0)),
        uncounted=uncounted,
    )
    blocks, act = [], ("activation_fn",)
    for i, layer in enumerate(t.layers):
        path = f"{where}.layers.{i}"
        parts(layer, path, "self_attn", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm", optional=act)
        mlp = (
            read_norm(layer.final_layer_norm, f"{path}.final_layer_norm", dtype),
            linear(layer.fc1, f"{path}.fc1", dtype),
            read_act(layer.activation_fn, f"{path}.activation_fn"),
            linear(layer.fc2, f"{path}.fc2", dtype),
        )
        attention = read_attention(layer.self_attn, f"{path}.self_attn", dtype)
        norm1 = read_norm(layer.self_attn_layer_norm, f"{path}.self_attn_layer_norm", dtype)
        blocks.append(Block(norm1=norm1, rest=Chain((Residual(Chain(mlp)),)), **attention))
    norm = read_norm(t.layer_norm, f"{where}.layer_norm")
    assert embedding.positions is not None
    return Encoder(blocks, embedding, min(len(embedding.positions), t.max_source_positions), norm)


def _read_t5(t: Any, where: str, dtype: torch.dtype | None) -> Encoder:
    parts(t, where, "embed_tokens", "block", "final_layer_norm")
    blocks = [_read_t5_layer(block.layer, f"{where}.block.{i}.layer", dtype, i > 0) for i, block in enumerate(t.block)]
    first = t.block[0].layer[0].SelfAttention
    bias = RelativeBias(read_weight(first.relative_attention_bias.weight), first.relative_attention_max_distance)
    embedding = Embedding(read_weight(t.embed_tokens.weight), None)
    return Encoder(blocks, embedding, _T5_CONTEXT, _rms_norm(t.final_layer_norm, f"{where}.final_layer_norm"), bias)


def _read_t5_layer(layer: Any, path: str, dtype: torch.dtype | None, later: bool) -> Block:
    if len(layer) != 2:
        raise unsupported(path, "has more than self-attention and an MLP: it is a decoder's")
    parts(layer[0], f"{path}.0", "SelfAttention", "layer_norm")
    parts(layer[1], f"{path}.1", "DenseReluDense", "layer_norm")
    attn, ff = layer[0].SelfAttention, layer[1].DenseReluDense
    parts(attn, f"{path}.0.SelfAttention", *"qkvo", optional=() if later else ("relative_attention_bias",))
    maps = {name: linear(getattr(attn, name), f"{path}.0.SelfAttention.{name}", dtype) for name in "qkvo"}
    mlp: tuple[Stage, ...]
    out: Affine = linear(ff.wo, f"{path}.1.DenseReluDense.wo", dtype)
    act = read_act(ff.act, f"{path}.1.DenseReluDense.act")
    if hasattr(ff, "wi_0"):
        gated = (linear(getattr(ff, name), f"{path}.1.DenseReluDense.{name}", dtype) for name in ("wi_0", "wi_1"))
        mlp = (below(*gated), Gated(act), out)
    else:
        mlp = (linear(ff.wi, f"{path}.1.DenseReluDense.wi", dtype), act, out)
    return Block(
        heads=attn.n_heads,
        norm1=_rms_norm(layer[0].layer_norm, f"{path}.0.layer_norm", dtype),
        qkv=below(maps["q"], maps["k"], maps["v"]),
        branch=Chain((maps["o"],)),
        rest=Chain((Residual(Chain((_rms_norm(layer[1].layer_norm, f"{path}.1.layer_norm", dtype), *mlp))),)),
        scale=1.0,
    )


def _rms_norm(norm: Any, path: str, dtype: torch.dtype | None = None) -> Norm:
    if not hasattr(norm, "variance_epsilon") or getattr(norm, "bias", None) is not None:
        raise unsupported(f"{path} ({type(norm).__name__})", "is not T5's RMS norm")
    return Norm(read_weight(norm.weight, dtype), None, norm.variance_epsilon, centred=False)
