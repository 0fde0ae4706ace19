"""Grounded fine-tuning against loops over pairs, and against autograd through the module's own forward."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import clipfast
from clipfast.data.datasets import open_dataset
from clipfast.data.inputs import prepare_all
from clipfast.engine.base import Item
from clipfast.errors import InputError, ModelError, TextError
from clipfast.finetune.grounded import Grounded, Told, global_loss, local_loss, pooled_regions
from clipfast.finetune.log import read_log
from clipfast.finetune.objective import Batch, Step
from clipfast.finetune.settings import Settings
from clipfast.finetune.train import Trainer
from clipfast.methods.grad_eclip import GradEclip
from clipfast.models.model import Model

CAPTIONS = ["a dog and a cat", "a red car next to a dog", "nothing here", "a cat"]
PHRASES = [["dog", "cat"], ["red car", "dog"], [], ["cat"]]


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def item(**columns: Any) -> Item:
    return Item("key", lambda: b"", columns)


def snapshot(module: nn.Module) -> tuple[Any, ...]:
    return (
        {name: t.clone() for name, t in module.state_dict().items()},
        [p.requires_grad for p in module.parameters()],
        [p.grad for p in module.parameters()],
        [m.training for m in module.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in module.modules()],
    )


def assert_untouched(module: nn.Module, before: tuple[Any, ...]) -> None:
    state, *rest = snapshot(module)
    assert all(torch.equal(state[name], t) for name, t in before[0].items())
    assert rest == list(before[1:])


@pytest.fixture
def model(build_clip, tokenizer) -> Model:
    return clipfast.load(build_clip().double(), tokenizer=tokenizer, device="cpu")


def prepared(model: Model, **options: Any) -> tuple[Grounded, Any, list[Told], Tensor]:
    """An objective on a model, the module that trains, and four images with what is said of them."""
    objective = Grounded(**{"phrases": "column:phrases", **options})
    trained = objective.prepare(model)
    told = [objective.read(item(caption=c, phrases=p))[0] for c, p in zip(CAPTIONS, PHRASES, strict=True)]
    images = torch.rand(4, 3, *model.spec.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return objective, trained, told, images


@pytest.mark.parametrize("bias", [None, -2.0])
@pytest.mark.parametrize("count", [1, 5])
def test_global_loss_is_open_clips_and_a_loop(count, bias) -> None:
    images, texts, scale = unit(count, 7), unit(count, 7, seed=1), torch.tensor(9.0, dtype=torch.float64)
    offset = None if bias is None else torch.tensor(bias, dtype=torch.float64)
    found = float(global_loss(images, texts, scale, offset))
    theirs = open_clip.loss.ClipLoss() if bias is None else open_clip.loss.SigLipLoss()
    assert found == pytest.approx(float(theirs(images, texts, scale, offset)), abs=1e-12)
    logits = [[float(scale * images[i] @ texts[j]) + (bias or 0) for j in range(count)] for i in range(count)]
    total = 0.0
    for i in range(count):
        row, column = (torch.tensor(line, dtype=torch.float64) for line in (logits[i], [one[i] for one in logits]))
        if bias is None:
            total -= float(row.log_softmax(0)[i] + column.log_softmax(0)[i]) / 2
        else:
            total -= sum(float(F.logsigmoid(v if i == j else -v)) for j, v in enumerate(row))
    assert found == pytest.approx(total / count, abs=1e-10)


@pytest.mark.parametrize("bias", [None, -2.0])
def test_local_loss_is_a_loop_in_which_a_phrase_is_never_its_own_negative(bias) -> None:
    said = ["dog", "cat", "dog", "car", "cat", "dog"]
    distinct = list(dict.fromkeys(said))
    phrases = dict(zip(distinct, unit(3, 7, seed=1), strict=True))
    regions, scale = unit(6, 7), torch.tensor(9.0, dtype=torch.float64)
    own = torch.tensor([distinct.index(one) for one in said])
    offset = None if bias is None else torch.tensor(bias, dtype=torch.float64)
    total = 0.0
    for region, mine in zip(regions, said, strict=True):
        # Each other phrase once, however many images have it.
        logits = {one: scale * region @ t + (bias or 0) for one, t in phrases.items()}
        if bias is None:
            total -= float(logits[mine] - torch.stack(list(logits.values())).logsumexp(0))
        else:
            total -= sum(float(F.logsigmoid(v if one == mine else -v)) for one, v in logits.items())
    found = local_loss(regions, torch.stack(list(phrases.values())), own, scale, offset)
    assert float(found) == pytest.approx(total / 6, abs=1e-12)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    again = local_loss(regions[order], torch.stack(list(phrases.values())), own[order], scale, offset)
    assert float(again) == pytest.approx(float(found), abs=1e-12)


def test_no_regions_cost_nothing() -> None:
    regions = torch.zeros(0, 7, requires_grad=True)
    loss = local_loss(regions, torch.zeros(2, 7), torch.zeros(0, dtype=torch.long), torch.tensor(3.0))
    loss.backward()
    assert float(loss.detach()) == 0 and regions.grad.shape == (0, 7)


def test_regions_are_means_that_the_maps_weigh() -> None:
    patches = unit(2, 5, 7).requires_grad_()
    maps = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    maps[0, 1], maps[1, 2] = 0, 3.5
    maps.requires_grad_()
    regions, marked = pooled_regions(patches, maps)
    assert marked.tolist() == [[True, False, True], [True, True, False]]
    assert float(regions[~marked].detach().abs().max()) == 0
    for b, p in marked.nonzero().tolist():
        values = maps[b, p].tolist()
        weights = [(value - min(values)) / (max(values) - min(values)) for value in values]
        mean = sum(w * e for w, e in zip(weights, patches[b], strict=True)) / sum(weights)
        torch.testing.assert_close(regions[b, p], mean / mean.norm(), rtol=0, atol=1e-12)
    regions.square().sum().sub(regions[..., 0].sum()).backward()
    assert maps.grad is None and float(patches.grad.abs().min()) > 0


def naive(module: Any, model: Model, images: Tensor, told: list[Told], weight: float) -> Tensor:
    """The loss by the module's own forward, image by image and phrase by phrase, maps as an explainer gives them."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (model.spec.mean, model.spec.std))
    x, scale = (images - mean) / std, module.logit_scale.exp()
    z, t = (F.normalize(e, dim=-1) for e in (
        module.encode_image(x), module.encode_text(torch.stack([one.caption for one in told]))
    ))  # fmt: skip
    logits, own = scale * z @ t.T, torch.arange(len(told))
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    embeddings = {p: F.normalize(module.encode_text(i[None]), dim=-1)[0]
                  for one in told for p, i in zip(one.phrases, one.ids, strict=True)}  # fmt: skip
    v, last = module.visual, module.visual.transformer.resblocks[-1]
    terms = []
    for image, one in zip(x, told, strict=True):
        h = v._embeds(image[None])
        for block in v.transformer.resblocks[:-1]:
            h = block(h)
        width = h.shape[-1]
        weights, biases = last.attn.in_proj_weight[2 * width :], last.attn.in_proj_bias[2 * width :]
        y = h + last.attn.out_proj(F.linear(last.ln_1(h), weights, biases))
        patches = F.normalize(v.ln_post(y + last.mlp(last.ln_2(y)))[0, 1:] @ v.proj, dim=-1)
        for phrase in one.phrases:
            with torch.no_grad():
                copy = Model(module, model.tokenizer, model.spec)
                heat = GradEclip().image(copy.towers()[0], image[None]).maps(embeddings[phrase][None].detach())[0, 0]
            heat = (heat - heat.min()) / (heat.max() - heat.min())
            region = F.normalize(heat / heat.sum() @ patches, dim=-1)
            all_of_them = torch.stack([scale * region @ e for e in embeddings.values()])
            terms.append(all_of_them.logsumexp(0) - scale * region @ embeddings[phrase])
    return loss + weight * torch.stack(terms).mean()


@pytest.mark.parametrize("options", [{}, {"weight": 0.3, "freeze_text": True}, {"checkpointing": True}])
def test_loss_and_gradients_are_those_of_the_modules_own_forward(model, options) -> None:
    objective, trained, told, images = prepared(model, **options)
    step = objective.losses(images, told)
    expected = naive(trained, model, images, told, options.get("weight", 1.0))
    assert float(step.loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-10)
    weights = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(step.loss, list(weights.values()))
    wanted = torch.autograd.grad(expected, list(weights.values()))
    for name, ours, theirs in zip(weights, found, wanted, strict=True):
        assert float((ours - theirs).norm()) <= 1e-9 * max(1.0, float(theirs.norm())), name
        assert float(ours.norm()) > 0, name
    text = {name for name in weights if not name.startswith(("visual.", "logit_"))}
    assert bool(text) is not options.get("freeze_text", False)
    assert step.counts == {"phrases": 5, "unmarked": 0}
    total = float(step.terms["global"]) + options.get("weight", 1.0) * float(step.terms["local"])
    assert total == pytest.approx(float(step.loss.detach()))


@pytest.mark.parametrize(
    "vision",
    [{"pool_type": "avg", "final_ln_after_pool": True}, {"attentional_pool": True, "attn_pooler_heads": 4}],
    ids=["mean", "attention pool"],
)
def test_towers_without_a_class_token_train(build_clip, tokenizer, vision) -> None:
    model = clipfast.load(build_clip(**vision).double(), tokenizer=tokenizer, device="cpu")
    objective, trained, told, images = prepared(model)
    step = objective.losses(images, told)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (model.spec.mean, model.spec.std))
    with torch.no_grad():
        z, t = trained.encode_image((images - mean) / std), trained.encode_text(torch.stack([o.caption for o in told]))
        scale = trained.logit_scale.exp()
        expected = global_loss(F.normalize(z, dim=-1), F.normalize(t, dim=-1), scale)
    assert float(step.terms["global"]) == pytest.approx(float(expected), abs=1e-10)
    step.loss.backward()
    assert step.counts["phrases"] == 5 and all(p.grad is not None for p in trained.parameters())


def test_local_loss_reaches_the_image_tower_below_its_last_block(model) -> None:
    objective, trained, told, images = prepared(model)
    plain, _, _, _ = prepared(model, weight=0.0)
    below = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    with_it = torch.autograd.grad(objective.losses(images, told).loss, dict(trained.named_parameters())[below])[0]
    step = plain.losses(images, told)
    assert plain._model is not None
    without = torch.autograd.grad(step.loss, dict(plain._model.module.named_parameters())[below])[0]
    assert float((with_it - without).norm()) > 0.1 * float(without.norm())
    assert step.counts == {} and plain.counts == ()


def test_a_batch_permutes(model) -> None:
    objective, _, told, images = prepared(model)
    order = [2, 0, 3, 1]
    found = objective.losses(images[order], [told[i] for i in order])
    assert float(found.loss.detach()) == pytest.approx(float(objective.losses(images, told).loss.detach()), abs=1e-12)


def test_a_batch_of_one_and_batches_without_phrases(model) -> None:
    objective, trained, told, images = prepared(model)
    one = objective.losses(images[:1], told[:1])
    # Its caption has no rival; its two phrases have each other.
    assert float(one.terms["global"]) == pytest.approx(0, abs=1e-12) and float(one.terms["local"]) > 0
    single = objective.losses(images[3:], told[3:])
    assert float(single.terms["local"]) == pytest.approx(0, abs=1e-12)
    none = objective.losses(images[2:3], told[2:3])
    assert none.counts == {"phrases": 0, "unmarked": 0} and "local" not in none.terms
    none.loss.backward()
    assert all(p.grad is not None for p in trained.parameters())
    mixed = objective.losses(images[2:], told[2:])
    assert mixed.counts == {"phrases": 1, "unmarked": 0}


def test_a_phrase_whose_map_marks_nothing_is_left_out(model, monkeypatch) -> None:
    objective, _, told, images = prepared(model)
    whole = GradEclip.from_last_block

    def blind(self: GradEclip, tower: Any, h: Tensor) -> Any:
        explained = whole(self, tower, h)
        explained.weights[0][1:] = 0
        return explained

    monkeypatch.setattr(GradEclip, "from_last_block", blind)
    step = objective.losses(images, told)
    assert step.counts == {"phrases": 5, "unmarked": 3}
    assert step.loss.isfinite()
    step.loss.backward()


def test_a_sigmoid_models_losses_are_sigmoids(model) -> None:
    model.module.logit_bias = nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))
    with torch.no_grad():
        model.module.logit_scale.fill_(5.0)
    objective, trained, told, images = prepared(model)
    step = objective.losses(images, told)
    step.loss.backward()
    assert trained.logit_bias.grad is not None and float(trained.logit_bias.grad.abs()) > 0
    # CLIP's ceiling is not SigLIP's.
    assert float(trained.logit_scale.detach()) == 5.0
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (model.spec.mean, model.spec.std))
    with torch.no_grad():
        z, t = trained.encode_image((images - mean) / std), trained.encode_text(torch.stack([o.caption for o in told]))
        theirs = open_clip.loss.SigLipLoss()(
            F.normalize(z, dim=-1), F.normalize(t, dim=-1), trained.logit_scale.exp(), trained.logit_bias
        )
    assert float(step.terms["global"]) == pytest.approx(float(theirs), abs=1e-10)


def test_the_scale_of_clip_stays_below_a_hundred(model) -> None:
    with torch.no_grad():
        model.module.logit_scale.fill_(6.0)
    before = snapshot(model.module)
    objective, trained, told, images = prepared(model)
    objective.losses(images, told).loss.backward()
    assert float(trained.logit_scale.detach().exp()) == pytest.approx(100)
    assert float(trained.logit_scale.grad.abs()) > 0
    assert_untouched(model.module, before)


def test_bfloat16_stays_near(build_clip, tokenizer) -> None:
    model = clipfast.load(build_clip(), tokenizer=tokenizer, device="cpu")
    objective, trained, told, images = prepared(model)
    whole = objective.losses(images.float(), told)
    with torch.autocast("cpu", torch.bfloat16):
        half = objective.losses(images.float(), told)
    assert half.loss.dtype == torch.float32
    for name in ("global", "local"):
        assert float(half.terms[name]) == pytest.approx(float(whole.terms[name]), rel=2e-2)
    parameter = trained.visual.transformer.resblocks[0].attn.in_proj_weight
    wide, narrow = (torch.autograd.grad(one.loss, parameter)[0] for one in (whole, half))
    assert float((wide - narrow).norm() / wide.norm()) < 0.1


def test_half_precision_models_train_in_float32(build_clip, tokenizer) -> None:
    model = clipfast.load(build_clip().bfloat16(), tokenizer=tokenizer, device="cpu")
    objective, trained, told, images = prepared(model)
    objective.losses(images.float(), told).loss.backward()
    assert {p.grad.dtype for p in trained.parameters()} == {torch.float32}


def test_reading_captions_and_given_phrases(model) -> None:
    objective, _, _, _ = prepared(model)
    several = objective.read(item(caption=["a dog", "a cat"], phrases='["dog", " the  cat", "dog", " "]'))
    assert [one.phrases for one in several] == [["dog", "the cat"]] * 2
    assert all(one.ids.shape == (2, 20) and one.caption.shape == (20,) for one in several)
    assert torch.equal(several[1].ids[0], model.tokenizer(["dog"])[0])
    assert objective.read(item(caption="a dog", phrases=None))[0].phrases == []
    assert objective.read(item(caption="a dog"))[0].ids.shape == (0, 20)
    assert objective.read(item(caption="a dog", phrases="a dog"))[0].phrases == ["a dog"]
    for phrases in (3, [3], '{"a": 1}', "7"):
        with pytest.raises(TextError, match="no list of texts"):
            objective.read(item(caption="a dog", phrases=phrases))
    with pytest.raises(TextError, match="no caption"):
        objective.read(item(phrases=["dog"]))


def test_one_of_several_captions_is_drawn_by_the_batchs_generator(model) -> None:
    objective, trained, told, images = prepared(model)
    own = [[told[0], told[1]], [told[1], told[3]], [told[2]], [told[3], told[0], told[1]]]

    def step(seed: int) -> Step:
        generator = torch.Generator().manual_seed(seed)
        return objective.step(trained, Batch(images.float(), list("abcd"), [], own, generator))

    losses = [float(step(seed).loss.detach()) for seed in range(8)]
    assert losses == [float(step(seed).loss.detach()) for seed in range(8)]
    assert len(set(losses)) > 3


def test_what_cannot_train_is_refused(model, build_clip) -> None:
    with pytest.raises(InputError, match="at least 0 and finite"):
        Grounded("scenes", weight=-1)
    with pytest.raises(InputError, match="layers=2"):
        Grounded("scenes", method=GradEclip(layers=2))
    with pytest.raises(InputError, match="no way to phrases"):
        Grounded("textblub")
    with pytest.raises(ModelError, match="without a tokenizer"):
        Grounded("scenes").prepare(clipfast.load(build_clip(), device="cpu"))
    objective, trained, told, images = prepared(model)
    trained.__class__ = type("Sharded", (FSDPModule, type(trained)), {})
    batch = Batch(images.float(), list("abcd"), [], [[one] for one in told], torch.Generator())
    with pytest.raises(InputError, match="parallel='ddp'"):
        objective.step(trained, batch)


def test_config_says_what_decides_the_weights() -> None:
    plain = Grounded("textblub", weight=0.0)
    assert plain.config() == {"weight": 0.0, "freeze_text": False, "caption": "caption"}
    assert plain.columns == ("caption",)
    given = Grounded("column:nouns", caption="title", weight=2.0)
    assert given.columns == ("title", "nouns")
    assert given.config()["phrases"] == "column:nouns" and given.config()["grad_eclip"]["spatial"] == "raw"


def test_the_demo_model_learns_its_phrases_and_stays_as_it_was(tmp_path) -> None:
    demo = clipfast.load("demo", device="cpu")
    before = snapshot(demo.module)
    settings = Settings(batch=12, steps=5, lr=3e-4, warmup=1, log_every=1, workers=1)
    done = Trainer(Grounded("scenes"), demo, "scenes:3:60", settings, tmp_path / "run").run()
    assert_untouched(demo.module, before)
    assert done.summary["complete"] and done.summary["phrases"] > 60 and done.summary["failed"] == 0
    log = read_log(tmp_path / "run")
    assert len(log) == 5 and all(set(line) >= {"loss", "global", "local"} for line in log)
    # On images of neither: the same losses before and after.
    samples = list(open_dataset("scenes:4:24"))
    losses = []
    for one in (demo, done.model()):
        objective = Grounded("scenes")
        objective.prepare(one)
        told = [objective.read(item(caption=sample.captions))[0] for sample in samples]
        pixels = torch.stack([p.pixels for p in prepare_all([sample.image for sample in samples], one.spec)])
        with torch.no_grad():
            losses.append(float(objective.losses(pixels.float() / 255, told).terms["local"]))
    assert losses[1] < 0.7 * losses[0]
    after = done.model().module.state_dict()
    moved = {name.split(".")[0] for name, t in demo.module.state_dict().items() if not torch.equal(t, after[name])}
    assert moved >= {"visual", "transformer", "token_embedding", "logit_scale"}


def test_captions_that_the_model_cannot_read_are_left_out(tmp_path) -> None:
    demo = clipfast.load("demo", device="cpu")
    objective = Grounded("scenes")
    objective.prepare(demo)
    with pytest.raises(TextError, match="zebra"):
        objective.read(item(caption="a dog and a zebra"))
    assert objective.read(item(caption="an empty background"))[0].phrases == []


def test_weights_that_no_embedding_depends_on_stay(model) -> None:
    model.module.caption_head = nn.Linear(3, 3).double()
    _, trained, _, _ = prepared(model)
    assert not any(p.requires_grad for p in trained.caption_head.parameters())
    assert all(p.requires_grad for name, p in trained.named_parameters() if not name.startswith("caption_head"))


def test_parts_that_run_without_gradients_are_refused(model, monkeypatch) -> None:
    monkeypatch.setattr(Model, "trained_towers", Model.towers)
    with pytest.raises(ModelError, match=r"without gradients to their \d+ weights, such as positional_embedding"):
        Grounded("scenes").prepare(model)
