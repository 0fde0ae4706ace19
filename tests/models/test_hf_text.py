"""The text side of transformers' models, of open_clip's with an encoder of transformers, and of CoCa."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from matrix import recorded
from torch import Tensor, nn

import clipfast
from clipfast.errors import InputError, ModelError
from clipfast.methods import METHODS
from clipfast.methods.grad_eclip import GradEclip
from clipfast.methods.integrated_gradients import IntegratedGradients
from clipfast.methods.leave_one_out import LeaveOneOut
from clipfast.models.families import text_tower
from clipfast.models.hf_text import RelativeBias
from clipfast.models.model import Model
from clipfast.models.text import OpaqueText, TextTower

transformers = pytest.importorskip("transformers")

BLOCKS, LENGTH, VOCABULARY, EMBED = 3, 16, 300, 24
SOT, EOT, PAD = 297, 298, 1
_VISION = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 8, "layers": 1}
_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
    "bos_token_id": SOT,
    "eos_token_id": EOT,
    "pad_token_id": PAD,
}
_BERT = {**_SMALL, "max_position_embeddings": LENGTH + 2}
_M2M = {
    "d_model": 32,
    "encoder_ffn_dim": 48,
    "encoder_layers": BLOCKS,
    "encoder_attention_heads": 4,
    "decoder_layers": 1,
    "decoder_ffn_dim": 8,
    "decoder_attention_heads": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
    "pad_token_id": PAD,
}
_T5 = {"d_model": 32, "d_kv": 10, "d_ff": 48, "num_layers": BLOCKS, "num_decoder_layers": 1, "num_heads": 4} | {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}
# Of transformers' own: what its text configuration has of its own.
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIP", {}),
    "clip-before-2023": ("CLIP", {"eos_token_id": 2}),
    "metaclip-2": ("MetaClip2", {}),
    "siglip": ("Siglip", {"projection_size": 32}),
    "siglip-2": ("Siglip2", {"projection_size": 32}),
    "altclip": ("AltCLIP", {"project_dim": 20, "max_position_embeddings": LENGTH + 2}),
    "chinese-clip": ("ChineseCLIP", {}),
    "clipseg": ("CLIPSeg", {}),
}
# In open_clip's HFTextEncoder: the configuration's class, its pooler and projection.
WITHIN: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "roberta": ("RobertaConfig", _BERT, "mean_pooler", "mlp"),
    "xlm-roberta": ("XLMRobertaConfig", _BERT, "mean_pooler", "linear"),
    "roberta-pooler": ("RobertaConfig", _BERT, "cls_pooler", "linear"),
    "bert-first": ("BertConfig", _SMALL, "cls_last_hidden_state_pooler", "linear"),
    "nllb": ("M2M100Config", _M2M, "cls_pooler", "linear"),
    "mt5": ("MT5Config", _T5, "mean_pooler", "linear"),
    "t5-relu": ("MT5Config", {**_T5, "feed_forward_proj": "relu"}, "mean_pooler", "mlp"),
}
# open_clip's own text transformer as CoCa has it, and with hidden padding.
PLAIN: dict[str, dict[str, Any]] = {
    "coca": {"embed_cls": True},
    "coca-mended": {"embed_cls": True, "correct_cls_mask": True},
    "coca-both-ways": {"embed_cls": True, "no_causal_mask": True},
    "padding-hidden": {"no_causal_mask": True, "use_pad_mask": True, "pool_type": "eos", "eos_id": EOT},
    "padding-hidden-last": {"no_causal_mask": True, "use_pad_mask": True, "pool_type": "last"},
}
MEANS = {"roberta", "xlm-roberta", "mt5", "t5-relu"}
ALL = [*OWN, *WITHIN, *PLAIN]
SITES = [name for name in ALL if name not in MEANS]


@pytest.fixture
def build(tmp_path):
    def build(name: str) -> Any:
        torch.manual_seed(0)
        if name in OWN:
            kind, text = OWN[name]
            vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
            sizes = {"num_patches": 4, "patch_size": 16, "image_size": 32}
            config = getattr(transformers, f"{kind}Config")
            model = getattr(transformers, f"{kind}Model")(
                config(vision_config=vision | sizes, text_config={**_SMALL, **text}, projection_dim=EMBED)
            )
        else:
            text = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 32, "heads": 4, "layers": BLOCKS}
            if name in WITHIN:
                config, parameters, pooler, projection = WITHIN[name]
                getattr(transformers, config)(**parameters).save_pretrained(tmp_path / name)
                text = {"hf_model_name": str(tmp_path / name), "hf_model_pretrained": False}
                text |= {"hf_pooler_type": pooler, "hf_proj_type": projection}
            model = open_clip.CustomTextCLIP(EMBED, _VISION, text)
            if name in PLAIN:
                # Configurations cannot say all of it.
                model.text = open_clip.transformer.TextTransformer(**text, output_dim=EMBED, pad_id=PAD, **PLAIN[name])
        with torch.no_grad():
            for parameter in model.parameters():
                spread = torch.randn_like(parameter) * 0.2
                parameter.copy_(spread + parameter.mean() if parameter.ndim == 1 else spread)
            model.logit_scale.fill_(1.5)
            for key, parameter in model.named_parameters():
                if "SelfAttention.q." in key:
                    # T5 has its attention's scale in the weights.
                    parameter.mul_(_T5["d_kv"] ** -0.5)
        return model.eval()

    return build


def own_embeddings(model: Any, ids: Tensor) -> Tensor:
    """The model's own unit embeddings of token ids (B, T)."""
    if hasattr(model, "encode_text"):
        return model.encode_text(ids, normalize=True)
    if type(model).__name__ == "ChineseCLIPModel":
        # In transformers 4.57 its get_text_features asks for a pooler that the model has not; this is its forward's.
        hidden = model.text_model(input_ids=ids, attention_mask=(ids != PAD).long())[0]
        return F.normalize(model.text_projection(hidden[:, 0]), dim=-1)
    # SigLIP's processors make no attention mask, all others do.
    known = {} if "Siglip" in type(model).__name__ else {"attention_mask": (ids != PAD).long()}
    # transformers 4.57 writes the lowest number of the model's dtype into a mask of the default one.
    own = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        found = model.get_text_features(input_ids=ids, **known)
    finally:
        torch.set_default_dtype(own)
    return F.normalize(found if isinstance(found, Tensor) else found.pooler_output, dim=-1)


def texts_of(*lengths: int) -> Tensor:
    """Token ids (B, T) of texts of so many tokens, with start and end, then padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(lengths), LENGTH), PAD)
    for row, length in zip(ids, lengths, strict=True):
        words = torch.randint(3, 290, (length - 2,), generator=generator)
        row[:length] = torch.cat((torch.tensor([SOT]), words, torch.tensor([EOT])))
    return ids


def words_of(ids: Tensor) -> Tensor:
    inside = (ids >= 3) & (ids < 290)
    return inside.cumsum(-1) * inside


def eager(model: Any) -> bool:
    """Whether transformers runs its text encoder by its own eager code, whose softmax is in float32."""
    inner = getattr(model, "text_model", None) or getattr(getattr(model, "text", None), "transformer", None)
    return getattr(getattr(inner, "config", None), "_attn_implementation", "sdpa") == "eager"


@pytest.mark.parametrize("name", ALL)
def test_embeddings_are_the_models_own(build, name):
    model, ids = build(name), texts_of(4, 9, LENGTH)
    tower = text_tower(model)
    assert isinstance(tower, TextTower) and tower.context_length >= LENGTH
    with torch.no_grad():
        expected = own_embeddings(model, ids)
        torch.testing.assert_close(tower.encode(ids), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(tower.encode(ids[:1]), expected[:1], rtol=0, atol=1e-5)
        assert (expected[0] - expected[1]).norm() > 0.01
        model = model.double()
        close = 1e-6 if eager(model) or "t5" in name else 1e-10
        torch.testing.assert_close(text_tower(model).encode(ids), own_embeddings(model, ids), rtol=0, atol=close)


@pytest.mark.parametrize("name", ["clip", "siglip", "chinese-clip", "roberta", "nllb", "mt5", "coca"])
def test_half_precision(build, name):
    model, ids = build(name), texts_of(4, 9, LENGTH)
    with torch.no_grad():
        expected = own_embeddings(model, ids)
        for tower in (Model(model).towers("bfloat16")[1], text_tower(build(name).bfloat16())):
            assert tower.encode(ids).dtype == torch.float32
            assert (tower.encode(ids) - expected).norm() < 2e-2 * expected.norm()


def naive_words(model: Any, row: Tensor, t: Tensor, pooled: int, layers: int) -> Tensor:
    """Grad-ECLIP (T,), signed, of one text (T,) by automatic differentiation through the model, its last `layers`."""
    with torch.enable_grad(), recorded() as seen:
        z = own_embeddings(model, row[None])[0]
    words = words_of(row) > 0
    total = torch.zeros(len(row), dtype=torch.float64)
    for q, k, v, out in seen[-layers:]:
        (g,) = torch.autograd.grad(z @ t, out, retain_graph=True)
        q, k, v, g = (each.detach().transpose(1, 2).flatten(2)[0] for each in (q, k, v, g))
        cosine = F.cosine_similarity(q[pooled], k[: len(row)])
        low, high = cosine[words].min(), cosine[words].max()
        total += torch.where(words, (cosine - low) / (high - low) * (v[: len(row)] @ g[pooled]), 0)
    return total.detach()


@pytest.mark.parametrize("layers", [1, 2, None])
@pytest.mark.parametrize("name", SITES)
def test_words_are_automatic_differentiation(build, name, layers):
    model, ids = build(name).double(), texts_of(6, 10, LENGTH)
    if eager(model):
        pytest.skip("this release of transformers has no fused attention for it, where the test looks in")
    tower = text_tower(model)
    t = F.normalize(torch.randn(own_embeddings(model, ids).shape[1], dtype=torch.float64), dim=0)
    read = tower.read(ids, whole=True)
    expected = torch.stack(
        [naive_words(model, *each, layers or BLOCKS) for each in zip(ids, [t] * 3, read.pooled, strict=True)]
    )
    assert (expected != 0).sum() > 20
    explained = GradEclip(layers=layers, signed=True).text(tower, ids, words_of(ids))
    for form in ("reverse", "features"):
        found = explained.maps(t[None], form=form)[:, 0]
        found = F.pad(found, (0, LENGTH - found.shape[1]))
        assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("name", ["clip", "siglip", "altclip", "nllb", "coca", "padding-hidden"])
def test_every_method_explains_words(build, name):
    tower, ids = text_tower(build(name)), texts_of(6, LENGTH)
    for method, kind in METHODS.items():
        if "text" not in kind.sides():
            continue
        quick = {"integrated_gradients": {"steps": 2}, "m2ib": {"steps": 2}, "rise": {"masks": 8}}.get(method, {})
        explained = kind(**quick).text(tower, ids, words_of(ids))
        t = F.normalize(torch.randn(2, explained.z.shape[1]), dim=-1)
        maps = explained.maps(t)
        assert maps.isfinite().all() and maps.shape[2] <= LENGTH and (maps != 0).any(), method
        assert (maps[..., 0] == 0).all() and (maps[0, :, 5:] == 0).all(), method
        with torch.no_grad():
            torch.testing.assert_close(explained.z.float(), tower.encode(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(MEANS))
def test_means_of_tokens(build, name):
    tower, ids = text_tower(build(name)), texts_of(6, LENGTH)
    words = words_of(ids)
    with pytest.raises(InputError, match="pools the mean of its tokens: no single token's attention writes it"):
        GradEclip().text(tower, ids, words)
    for method in ("saliency", "integrated_gradients", "m2ib", "leave_one_out", "kernel_shap", "grad_cam"):
        explained = METHODS[method]().text(tower, ids, words)
        maps = explained.maps(F.normalize(torch.randn(2, explained.z.shape[1]), dim=-1))
        assert maps.isfinite().all() and (maps != 0).any() and (maps[0, :, 5:] == 0).all(), method


@pytest.mark.parametrize("name", ["chinese-clip", "roberta", "mt5", "nllb", "coca", "siglip"])
def test_words_left_out_as_the_model_itself_reads_the_rest(build, name):
    model, ids = build(name).double(), texts_of(5, 8)
    explained = LeaveOneOut().text(text_tower(model), ids, words_of(ids))
    t = F.normalize(torch.randn(explained.z.shape[1], dtype=torch.float64), dim=0)
    maps = explained.maps(t[None])[:, 0]
    close = 1e-6 if eager(model) or name == "mt5" else 1e-10
    with torch.no_grad():
        for row, values in zip(ids, maps, strict=True):
            for place in words_of(row).nonzero()[:, 0].tolist():
                rest = torch.cat((row[:place], row[place + 1 :], torch.tensor([PAD])))
                difference = (own_embeddings(model, row[None]) - own_embeddings(model, rest[None]))[0] @ t
                torch.testing.assert_close(values[place], difference, rtol=0, atol=close)


@pytest.mark.parametrize("name", ["chinese-clip", "roberta", "nllb", "coca"])
def test_integrated_gradients_add_up(build, name):
    """From texts of which only the places are left, to the texts; T5's are left with nothing, where its norm breaks."""
    model, ids = build(name).double(), texts_of(6, 9)
    explained = IntegratedGradients(steps=256).text(text_tower(model), ids, words_of(ids))
    t = F.normalize(torch.randn(1, explained.z.shape[1], dtype=torch.float64), dim=-1)
    total = explained.maps(t)[:, 0].sum(1)
    blank = text_tower(model).read(ids, blank=words_of(ids) > 0)
    start = text_tower(model).finish(blank.h, blank.pooled, mask=blank.mask, visible=blank.visible)
    change = ((explained.z - start) @ t[0]).detach()
    assert change.abs().max() > 1e-3
    torch.testing.assert_close(total, change, rtol=1e-2, atol=1e-4)


def test_padding_on_the_left_and_in_the_middle(build):
    """RoBERTa's places count tokens alone, wherever padding is."""
    model = build("roberta")
    ids = texts_of(6, 9)
    left = ids.roll(3, dims=1)
    left[0, 5] = PAD
    with torch.no_grad():
        torch.testing.assert_close(text_tower(model).encode(left), own_embeddings(model, left), rtol=0, atol=1e-5)


def test_relative_bias_is_t5s(build):
    model = build("mt5")
    own = model.text.transformer.block[0].layer[0].SelfAttention
    for length in (1, 3, 40):
        bias = RelativeBias(own.relative_attention_bias.weight, own.relative_attention_max_distance)
        assert torch.equal(bias(length), own.compute_bias(length, length))


@pytest.mark.parametrize("name", ["clip", "chinese-clip", "mt5", "nllb", "coca"])
def test_gradients_reach_the_weights_and_nothing_else_changes(build, name):
    model = build(name)
    state = {key: t.clone() for key, t in model.state_dict().items()}
    flags = [(m.training, len(m._forward_hooks), len(m.__dict__)) for m in model.modules()]
    ids = texts_of(5, 9)
    text_tower(model).encode(ids)
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert flags == [(m.training, len(m._forward_hooks), len(m.__dict__)) for m in model.modules()]
    t = torch.randn(own_embeddings(model, ids).shape[1])
    (own_embeddings(model, ids) @ t).sum().backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (Model(model).trained_towers()[1].encode(ids) @ t).sum().backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(expected) > 10
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5, msg=key)


def test_words_of_many_texts_in_the_joint_space(build):
    """`token_states`: every token through the head of a tower that pools the mean, or the first token."""
    for name in ("chinese-clip", "roberta", "clip"):
        model = Model(build(name), _tokenizer())
        states = model.token_states(["one red dog", "two"])
        assert states.names == [["one", "red", "dog"], ["two"]] and states.words.shape[0] == 4
        torch.testing.assert_close(states.texts, model.encode_texts(["one red dog", "two"]))


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<pad>": PAD, "<unk>": 3, "one": 10, "red": 11, "dog": 12, "two": 13, "<s>": SOT, "</s>": EOT}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", SOT), ("</s>", EOT)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def _with_an_adapter(model: Any) -> Any:
    text = getattr(model, "text_model", None) or model.text.transformer
    layers = getattr(text.encoder, "layer", None) or text.encoder.layers
    part = getattr(layers[0], "intermediate", None) or layers[0].mlp
    part.adapter = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize("name", ["clip", "siglip", "chinese-clip", "roberta"])
def test_encoders_of_unknown_structure_give_embeddings(build, name):
    module = _with_an_adapter(build(name))
    model = clipfast.load(module, tokenizer=_tokenizer())
    tower = model.towers()[1]
    assert isinstance(tower, OpaqueText)
    ids = model.tokenize(["one red dog", "two"])
    with torch.no_grad():
        if name != "chinese-clip" or not eager(module):
            expected = own_embeddings(module, ids)
            torch.testing.assert_close(model.encode_texts(["one red dog", "two"]), expected, rtol=0, atol=1e-5)
            assert (expected[0] - expected[1]).norm() > 0.01
    if name == "chinese-clip" and eager(module):
        pytest.skip("get_text_features of this release of transformers fails for it")
    x = torch.randn(1, 3, 32, 32)
    assert clipfast.explain(x, ["one red dog"], model=model).maps.shape == (1, 1, 2, 2)
    with pytest.raises(InputError, match=r"gives embeddings alone, .*has a part 'adapter' that is not known"):
        clipfast.Explainer(model).words(x, "one red dog")
    for method in ("integrated_gradients", "m2ib", "mmel", "attention", "saliency"):
        with pytest.raises(InputError, match="gives embeddings alone"):
            clipfast.Explainer(model, method).words(x, "one red dog")
    words = clipfast.Explainer(model, "leave_one_out").words(x, "one red dog")
    assert words.words == ["one", "red", "dog"] and (words.values != 0).all()
    assert not module.training and all(p.requires_grad for p in module.parameters())


def test_what_neither_is_read_nor_encodes_texts(build):
    class Half(nn.Module):
        def __init__(self, module: Any):
            super().__init__()
            self.vision_model, self.visual_projection = module.vision_model, module.visual_projection

    with pytest.raises(ModelError, match="has no 'token_embedding' for its text side"):
        Model(Half(build("clip")))
