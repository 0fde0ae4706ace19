from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import clipfast
import clipfast.finetune
from clipfast.data.decode import decode
from clipfast.errors import InputError, ModelError
from clipfast.finetune.adversary import perturb
from clipfast.finetune.data import Loader, Place, open_images
from clipfast.finetune.log import read_log
from clipfast.finetune.objective import Batch, Objective, Step, copied
from clipfast.finetune.parallel import blocks
from clipfast.finetune.recipe import Adversarial, aft_objective, betas_of, fare_objective
from clipfast.finetune.settings import Settings, rate
from clipfast.finetune.train import Trainer, _mixed
from clipfast.models.model import Model

sys.path.insert(0, str(Path(__file__).parent))
from tiny import At, finetune, tiny, tokens

TIMED = ("images_per_second", "seconds_left")


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "state.pt")["trained"]


def equal(a: Any, b: Any) -> bool:
    """Nested, bit for bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def close(a: dict[str, Tensor], b: dict[str, Tensor], start: nn.Module, tolerance: float) -> bool:
    """Whether two trainings moved the weights alike, as a share of the largest move."""
    first = start.state_dict()
    moved = max(float((a[k] - first[k]).abs().max()) for k in a if a[k].is_floating_point())
    return moved > 0 and all(float((a[k] - b[k]).abs().max()) <= tolerance * moved for k in a)


def test_the_schedule_rises_and_falls() -> None:
    found = [rate(step, 100, 2.0, 10) for step in range(100)]
    assert found[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert max(found) == found[9] == found[10] == 2.0
    assert found[10:] == sorted(found[10:], reverse=True) and 0 < found[-1] < 1e-3
    assert found[55] == pytest.approx(1.0)


def test_it_is_the_objective_of_the_paper(photos: Path, tmp_path: Path) -> None:
    """Against a loop that spells it out: frozen targets, noise, AdamW with decay, cosine with warm-up; in float64."""
    start = tiny(torch.float64)
    objective = aft_objective(steps=2)
    settings = {"steps": 4, "batch": 4, "micro": 4, "lr": 1e-3, "warmup": 2, "seed": 5}
    finetune(photos, tmp_path / "run", model=start, objective=objective, **settings)

    tower = copy.deepcopy(start.module.visual)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (start.spec.mean, start.spec.std))
    adamw = torch.optim.AdamW(tower.parameters(), betas=(0.9, 0.95), weight_decay=1e-4)
    loader = Loader(open_images(str(photos), seed=5), start.spec, lambda item: None, batch=4, micro=4)
    for step, loaded in zip(range(4), loader.steps(Place()), strict=False):
        data = [(photos / read.key).read_bytes() for read in loaded.parts[0]]
        x = torch.stack([decode(one, start.spec).pixels for one in data]).float().div(255).double()
        with torch.no_grad():
            target = start.module.visual((x - mean) / std)
        generator = torch.Generator().manual_seed(_mixed(5, step, 0))
        found = perturb(
            lambda pixels: tower((pixels - mean) / std),
            lambda z, target=target: (z - target).square().sum(-1) / 2,
            x,
            objective.adversary,
            generator,
        )
        noise = torch.empty_like(x).normal_(0, 1 / 255, generator=generator)
        loss = ((tower((x + found.delta + noise - mean) / std) - target).square().sum(-1) / 2).mean()
        adamw.zero_grad()
        loss.backward()
        adamw.param_groups[0]["lr"] = [5e-4, 1e-3, 1e-3, 5e-4][step]
        adamw.step()
    ours = weights(tmp_path / "run")
    assert close(ours, tower.state_dict(), start.module.visual, 1e-6)


def test_the_model_stays_as_it_is(photos: Path, tmp_path: Path) -> None:
    start = tiny()
    start.module.train()
    for parameter in start.module.visual.parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(start.module.state_dict())
    state = torch.get_rng_state()
    tuned = finetune(photos, tmp_path / "run", model=start)
    assert equal(before, dict(start.module.state_dict()))
    assert start.module.training and not any(p.requires_grad for p in start.module.visual.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in start.module.modules())
    assert torch.equal(torch.get_rng_state(), state)
    found = tuned.model()
    assert not torch.equal(found.module.visual.proj, start.module.visual.proj)
    assert torch.equal(found.module.token_embedding.weight, start.module.token_embedding.weight)
    assert clipfast.explain([photos / "0.png"], ["a dog"], model=found).maps.isfinite().all()


def test_it_learns_to_withstand(photos: Path, tmp_path: Path) -> None:
    finetune(photos, tmp_path / "run", steps=40, batch=5, lr=2e-3, objective=fare_objective(8 / 255, steps=3))
    log = read_log(tmp_path / "run")
    assert sum(one["loss"] for one in log[-8:]) < 0.5 * sum(one["loss"] for one in log[:8])
    assert log[-1]["adversarial_cosine"] > log[0]["adversarial_cosine"]


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_run_that_ended_midway_goes_on_bit_for_bit(photos: Path, tmp_path: Path, how: str) -> None:
    (photos / "4.png").write_bytes(b"broken")
    whole = finetune(photos, tmp_path / "whole", steps=7, save_every=3)
    cut = tmp_path / "cut"
    if how == "killed":
        request = {"images": str(photos), "out": str(cut), "settings": {"steps": 7, "save_every": 3}, "kill_at": 5}
        script = Path(__file__).with_name("tiny.py")
        killed = subprocess.run([sys.executable, script, json.dumps(request)], capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert read_log(cut)[-1]["step"] == 5
        assert torch.load(cut / "state.pt")["step"] == 3
    else:
        stopped = finetune(photos, cut, steps=7, save_every=3, follow=At(4, signal.SIGTERM))
        # The signal came after step 4 was over: the next one is the step at hand.
        assert not stopped.summary["complete"] and stopped.summary["step"] == 5
        assert torch.load(cut / "state.pt")["step"] == 5
    follow = At()
    again = finetune(photos, cut, steps=7, save_every=3, follow=follow)
    assert follow.records[0]["step"] == (4 if how == "killed" else 6)
    assert again.summary["complete"]
    assert equal(torch.load(cut / "state.pt"), torch.load(tmp_path / "whole" / "state.pt"))
    logs = [[{k: v for k, v in one.items() if k not in TIMED} for one in read_log(f)] for f in (cut, whole.folder)]
    assert logs[0] == logs[1] and len(logs[0]) == 7
    assert (cut / "errors.jsonl").read_text() == (whole.folder / "errors.jsonl").read_text()
    assert equal(dict(again.model().module.state_dict()), dict(whole.model().module.state_dict()))


def test_a_complete_run_is_read(photos: Path, tmp_path: Path) -> None:
    first = finetune(photos, tmp_path / "run")
    follow = At()
    again = finetune(photos, tmp_path / "run", follow=follow)
    assert not follow.records
    assert again.summary["this_run"]["steps"] == 0
    assert {**again.summary, "this_run": None} == {**first.summary, "this_run": None}


def test_threads_and_parts_of_a_batch_do_not_matter(photos: Path, tmp_path: Path) -> None:
    """Supervised and from zero nothing is random; in float64 even Adam tells rounding from a gradient."""
    objective = fare_objective(steps=2, start="zero", captions="caption", direction="gradient", step_size=1.0)
    given = {"model": tiny(torch.float64), "objective": objective, "batch": 6}
    (photos / "9.png").write_bytes(b"broken")
    finetune(photos, tmp_path / "one", workers=1, **given)
    finetune(photos, tmp_path / "four", workers=4, **given)
    assert equal(weights(tmp_path / "one"), weights(tmp_path / "four"))
    finetune(photos, tmp_path / "parts", micro=2, **given)
    assert close(weights(tmp_path / "one"), weights(tmp_path / "parts"), given["model"].module.visual, 1e-6)


def processes(requests: Sequence[dict[str, Any]], world: int) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    words = [sys.executable, str(Path(__file__).with_name("tiny.py")), *map(json.dumps, requests)]
    children = [
        subprocess.Popen(
            words,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    found = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0] * world, found
    return [json.loads(line) for line in found[0][0].splitlines()]


def test_two_processes_train_as_one_does(photos: Path, tmp_path: Path) -> None:
    """Noise is drawn by micro-batch: two of half a batch, in one process or in two, are the same training."""
    # All that the second process should read in one of the steps.
    (photos / "4.png").write_bytes(b"broken")
    settings = {"steps": 4, "batch": 4, "micro": 2, "save_every": 2, "weight_decay": 0.01}
    start = tiny(torch.float64)
    finetune(photos, tmp_path / "one", model=start, **settings)
    shared = {"images": str(photos), "dtype": "float64"}
    requests = [
        {**shared, "out": str(tmp_path / kind), "settings": {**settings, "parallel": kind}} for kind in ("ddp", "fsdp")
    ]
    summaries = processes(requests, 2)
    one = torch.load(tmp_path / "one" / "state.pt")
    for kind, summary in zip(("ddp", "fsdp"), summaries, strict=True):
        assert summary["complete"] and summary["this_run"]["processes"] == 2
        two = torch.load(tmp_path / kind / "state.pt")
        assert close(one["trained"], two["trained"], start.module.visual, 1e-6)
        assert equal([one["counts"], one["place"]], [two["counts"], two["place"]])
        assert two["optimizer"]["state"].keys() == one["optimizer"]["state"].keys()
        log = read_log(tmp_path / kind)
        assert [r["loss"] for r in log] == pytest.approx([r["loss"] for r in read_log(tmp_path / "one")], rel=1e-9)
        lines = (tmp_path / kind / "errors.jsonl").read_text()
        assert sorted(lines.splitlines()) == sorted((tmp_path / "one" / "errors.jsonl").read_text().splitlines())


class Spoilt(Objective):
    """Draws the embeddings to zero; its gradient is NaN at some steps."""

    name = "spoilt"
    counts = ("spoilt",)

    def __init__(self, at: Sequence[int]):
        self.at, self.seen = at, 0

    def config(self) -> dict[str, Any]:
        return {"at": list(self.at)}

    def prepare(self, model: Model) -> nn.Module:
        return copied(model.module.visual)

    def step(self, trained: nn.Module, batch: Batch) -> Step:
        self.seen += 1
        spoilt = self.seen in self.at
        return Step(trained(batch.images).square().mean() * (float("nan") if spoilt else 1), {}, {"spoilt": spoilt})


def test_steps_without_a_gradient_are_left_out_and_counted(photos: Path, tmp_path: Path) -> None:
    done = finetune(photos, tmp_path / "run", steps=5, objective=Spoilt([2, 4]))
    assert (done.summary["skipped"], done.summary["spoilt"], done.summary["images"]) == (2, 2, 20)
    assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())
    assert [one["loss"] is None for one in read_log(tmp_path / "run")] == [False, True, False, True, False]
    with pytest.raises(ModelError, match="NaN or infinite for 10 steps, the last of them step 12"):
        finetune(photos, tmp_path / "hopeless", steps=30, objective=Spoilt(range(3, 31)))


def test_odd_images_are_trained_on_or_counted(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "black.png")
    Image.new("RGB", (1, 300), "white").save(folder / "thin.png")
    Image.new("L", (5, 5), 100).save(folder / "small.png")
    (folder / "no.png").write_bytes(b"GIF89a")
    for recipe in ("paper", "released"):
        for penalty in ("huber", "elastic_net", "group_norm"):
            out = tmp_path / f"{recipe}-{penalty}"
            objective = aft_objective(recipe, penalty=penalty, steps=2, group=8)  # type: ignore[arg-type]
            done = finetune(folder, out, steps=2, batch=4, objective=objective)
            assert (done.summary["images"], done.summary["failed"], done.summary["skipped"]) == (6, 2, 0)
            assert all(w.isfinite().all() for w in weights(out).values())
    (folder / "no.png").unlink()
    one = finetune(folder, tmp_path / "one", steps=3, batch=1)
    assert one.summary["images"] == 3
    for path in folder.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"not one of the 2 images of step 1 can be read: .* is empty"):
        finetune(folder, tmp_path / "none", batch=2)


def test_statistics_of_a_resnet(photos: Path, tmp_path: Path, build_resnet: Any) -> None:
    start = Model(build_resnet(), tokens, name="resnet")
    before = {k: v.clone() for k, v in start.module.visual.state_dict().items()}
    settings = {"model": start, "steps": 2, "batch": 2, "lr": 1e-5}
    for how, moves in (("frozen", False), ("batch", True)):
        finetune(photos, tmp_path / how, objective=fare_objective(steps=1, batch_norm=how), **settings)  # type: ignore[arg-type]
        found = weights(tmp_path / how)
        assert equal(before, dict(start.module.visual.state_dict()))
        assert torch.equal(found["bn1.running_mean"], before["bn1.running_mean"]) != moves
        assert not torch.equal(found["bn1.weight"], before["bn1.weight"])
        # The inner problem leaves them alone: two steps, two batches.
        counted = int(found["bn1.num_batches_tracked"] - before["bn1.num_batches_tracked"])
        assert counted == (2 if moves else 0)
    with pytest.raises(InputError, match="twice"):
        finetune(photos, tmp_path / "x", objective=fare_objective(batch_norm="batch"), checkpointing=True, **settings)


def test_checkpointing_and_bfloat16_train_alike(photos: Path, tmp_path: Path, build_resnet: Any) -> None:
    resnet = Model(build_resnet(), tokens, name="resnet")
    for name, start in {"vit": tiny(), "resnet": resnet}.items():
        assert len(blocks(start.module.visual)) == (2 if name == "vit" else 4)
        objective = fare_objective(steps=1, batch_norm="frozen")
        settings = {"model": start, "steps": 2, "batch": 2, "lr": 1e-5, "objective": objective}
        finetune(photos, tmp_path / name, **settings)
        finetune(photos, tmp_path / f"{name}-again", checkpointing=True, **settings)
        plain, again = weights(tmp_path / name), weights(tmp_path / f"{name}-again")
        assert close(plain, again, start.module.visual, 1e-2)
        finetune(photos, tmp_path / f"{name}-half", precision="bfloat16", **settings)
        half = weights(tmp_path / f"{name}-half")
        assert all(w.dtype == plain[k].dtype for k, w in half.items())
        moves = [
            torch.cat([(w[k] - start.module.visual.state_dict()[k]).flatten().float() for k in plain])
            for w in (plain, half)
        ]
        assert F.cosine_similarity(*moves, dim=0) > 0.5
        # Of the first step: the second is taken from other weights, and a network at random is not smooth there.
        losses = [read_log(tmp_path / f)[0]["loss"] for f in (name, f"{name}-half")]
        assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1, abs=1e-3)


def test_a_compiled_tower_trains_alike(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as ever, with a compiler that takes no minutes."""
    traced = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: traced(self, backend="aot_eager"))
    start = tiny(torch.float64)
    finetune(photos, tmp_path / "plain", model=start, steps=3)
    finetune(photos, tmp_path / "compiled", model=start, steps=3, compile=True)
    plain, compiled = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    assert close(plain, compiled, start.module.visual, 1e-6)


def test_captions_are_the_targets_of_the_supervised_form(photos: Path, tmp_path: Path) -> None:
    start = tiny()
    (photos / "3.txt").unlink()
    objective = aft_objective(steps=2, captions="caption")
    done = finetune(photos, tmp_path / "run", model=start, objective=objective, steps=40, batch=5, lr=1e-3)
    assert done.summary["failed"] == done.summary["images"] / 9
    found, log = done.model(), read_log(tmp_path / "run")
    assert sum(r["loss"] for r in log[-5:]) < 0.7 * sum(r["loss"] for r in log[:5])
    paths = [p for p in sorted(photos.glob("*.png")) if p.name != "3.png"]
    texts = found.encode_texts([p.with_suffix(".txt").read_text() for p in paths])
    scores = [clipfast.explain(paths, texts, model=m).scores.diagonal().mean() for m in (start, found)]
    assert scores[1] > scores[0] + 0.2


def test_a_tower_of_timm(photos: Path, tmp_path: Path, build_stages: Any) -> None:
    start = Model(build_stages(), tokens, name="stages")
    for checkpointing in (False, True):
        out = tmp_path / f"{checkpointing}"
        done = finetune(photos, out, model=start, steps=2, batch=2, checkpointing=checkpointing)
        assert done.summary["skipped"] == 0
        assert done.model().module.visual.state_dict().keys() == start.module.visual.state_dict().keys()
    assert not equal(weights(out), dict(start.module.visual.state_dict()))
    assert len(blocks(start.module.visual)) > 1


def test_half_precision_weights_train_in_float32(photos: Path, tmp_path: Path) -> None:
    start = tiny()
    half = Model(copy.deepcopy(start.module).bfloat16(), tokens, name="half")
    done = finetune(photos, tmp_path / "run", model=half, steps=1)
    assert {w.dtype for w in weights(tmp_path / "run").values()} == {torch.float32}
    assert done.model().module.visual.proj.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"batch": 0}, "batch=0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"precision": "half"}, "precision"),
        ({"warmup": 7}, "warmup=7 is more than the 6 steps"),
        ({"parallel": "horovod"}, "no parallelism 'horovod'"),
    ],
)
def test_settings_that_cannot_be(photos: Path, tmp_path: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        finetune(photos, tmp_path / "run", **given)
    assert not (tmp_path / "run" / "state.pt").exists()


def test_epochs_become_steps(photos: Path, tmp_path: Path) -> None:
    start = tiny()
    assert Trainer(aft_objective(), start, str(photos), Settings(epochs=3, batch=4), tmp_path).steps == 7
    default = Trainer(aft_objective(), start, str(photos), Settings(epochs=100, batch=10), tmp_path)
    assert (default.steps, default.warmup) == (100, 7)


def test_recipes_differ_as_the_page_says() -> None:
    paper, released, fare = aft_objective(), aft_objective("released"), fare_objective(2 / 255)
    assert (paper.samples, released.samples, fare.samples) == (1, 0, 0)
    assert (paper.normalize, released.normalize, fare.normalize) == (False, True, False)
    assert (paper.batch_norm, released.batch_norm, fare.batch_norm) == ("frozen", "batch", "batch")
    assert (betas_of("paper"), betas_of("released")) == ((0.9, 0.95), (0.9, 0.999))
    assert isinstance(fare, Adversarial) and (fare.adversary.eps, fare.adversary.sigma) == (2 / 255, 0)
    with pytest.raises(InputError, match="recipe 'papper': did you mean 'paper'"):
        aft_objective("papper")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch_norm"):
        aft_objective(batch_norm="evaluation")  # type: ignore[arg-type]


def test_from_python(tmp_path: Path) -> None:
    settings = Settings(steps=1, batch=2)
    for train, given in ((clipfast.finetune.aft, {"recipe": "released"}), (clipfast.finetune.fare, {"eps": 2 / 255})):
        tuned = train("scenes:5:4", tmp_path / train.__name__, settings=settings, steps=1, **given)
        assert tuned.summary["complete"] and tuned.summary["images"] == 2
        assert clipfast.load(tuned.path).spec == tuned.model().spec
