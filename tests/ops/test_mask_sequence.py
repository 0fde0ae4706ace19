from __future__ import annotations

import itertools
import math
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Normalize, ToTensor

import clipfast.native
from clipfast.errors import BackendError, InputError
from clipfast.ops.dispatch import backend
from clipfast.ops.mask_sequence import Noise, mask_sequence, rank_map

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

needs_native = pytest.mark.skipif(
    clipfast.native.problem("_native") is not None, reason="the native module is not built here"
)


def by_hand(images: Tensor, ranks: Tensor, fractions: list[float], deletion: bool, fill: Tensor) -> Tensor:
    """The op in float64, a pixel at a time."""
    (b, c, h, w), p, s = images.shape, ranks.shape[1], len(fractions)
    out = torch.empty(b * p * s, c, h, w, dtype=torch.float64)
    for item, (i, j, k) in enumerate(itertools.product(range(b), range(p), range(s))):
        count = math.floor(fractions[k] * h * w + 0.5)
        for y, x in itertools.product(range(h), range(w)):
            gone = int(ranks[i, j, y, x]) < count
            out[item, :, y, x] = (fill if gone == deletion else images)[i, :, y, x].double()
    return out


@pytest.mark.parametrize("name", ["torch", pytest.param("native", marks=needs_native)])
class TestLiteralValues:
    def test_two_by_two_in_two_steps(self, name: str) -> None:
        image = torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]], dtype=torch.float64)
        with backend(name):
            deletion = mask_sequence(image, image, [0, 0.5, 1])
            insertion = mask_sequence(image, image, [0, 0.5, 1], "insertion")
        torch.testing.assert_close(deletion.sum((1, 2, 3)), torch.tensor([1, 0.3, 0], dtype=torch.float64))
        torch.testing.assert_close(insertion.sum((1, 2, 3)), torch.tensor([0, 0.7, 1], dtype=torch.float64))

    def test_five_pixels_in_three_steps(self, name: str) -> None:
        image = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1], dtype=torch.float64).view(1, 1, 1, 5)
        with backend(name):
            deleted = mask_sequence(image, image, [0, 0.4, 0.8, 1]).sum((1, 2, 3))
        torch.testing.assert_close(deleted, torch.tensor([1, 0.45, 0.1, 0], dtype=torch.float64))

    def test_ties_go_by_index_and_halves_round_up(self, name: str) -> None:
        image = torch.ones(1, 1, 1, 5)
        with backend(name):
            masked = mask_sequence(image, torch.zeros(1, 1, 1, 5), [0.1, 0.3, 0.29])
        assert masked.flatten(1).tolist() == [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]

    def test_every_count_of_a_large_image_is_reached_exactly(self, name: str) -> None:
        n = 224 * 224
        counts = torch.arange(0, n + 1, 331)
        image, ranks = torch.ones(1, 1, 224, 224), torch.arange(n).view(1, 1, 224, 224)
        with backend(name):
            for fractions in (counts.double() / n, counts.float() / n):
                assert torch.equal(n - mask_sequence(image, ranks, fractions).sum((1, 2, 3)).long(), counts)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 7), st.integers(1, 9)),
    prompts=st.integers(1, 3),
    fractions=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    deletion=st.booleans(),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("name", ["torch", pytest.param("native", marks=needs_native)])
def test_agrees_with_a_loop_over_pixels(
    name: str, shape: tuple[int, ...], prompts: int, fractions: list[float], deletion: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images, fill = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    b, _, h, w = shape
    ranks = torch.rand(b, prompts, h * w, generator=generator).argsort(-1).view(b, prompts, h, w)
    with backend(name):
        ours = mask_sequence(images, ranks, fractions, "deletion" if deletion else "insertion", fill)
    assert torch.equal(ours, by_hand(images, ranks, fractions, deletion, fill))


def variants() -> dict[str, dict[str, Any]]:
    """Inputs of every kind that the native module reads, each by what is special about it."""
    g = torch.Generator().manual_seed(0)
    uint8 = torch.randint(0, 256, (3, 3, 37, 61), generator=g, dtype=torch.uint8)
    real = torch.randn(3, 3, 37, 61, generator=g, dtype=torch.float64)
    maps = torch.rand(3, 2, 37, 61, generator=g)
    ranks = rank_map(maps)
    base: dict[str, Any] = {"images": uint8, "order": ranks, "fractions": [0, 0.1, 0.37, 1], "mean": MEAN, "std": STD}
    wide = torch.randint(0, 256, (3, 37, 122, 6), generator=g, dtype=torch.uint8)
    return {
        "uint8": base,
        "insertion": base | {"mode": "insertion", "fill": 0.5},
        "map": base | {"order": maps},
        "indices": base | {"order": torch.rand(3, 2, 37 * 61, generator=g).argsort(-1)},
        "int64 ranks past int32": base | {"order": ranks.long() + torch.tensor([[[[-(2**40)]], [[2**40]]]])},
        "expanded ranks": base | {"order": ranks[:1, :1].expand(3, 4, -1, -1)},
        "transposed ranks": base | {"order": ranks.mT.contiguous().mT},
        "normalised": base | {"images": real, "mean": None, "std": None},
        "float32": base | {"images": real.float()},
        "float16": base | {"images": real.half(), "fill": real.flip(0).bfloat16()},
        "bfloat16": base | {"images": real.bfloat16(), "fill": real.flip(0).half()},
        "channels last": base | {"images": uint8.contiguous(memory_format=torch.channels_last)},
        "cropped": base
        | {"images": wide.permute(0, 3, 1, 2)[:, ::2, :, ::2], "fill": wide.permute(0, 3, 1, 2)[:, 1::2, :, 1::2]},
        "expanded images": base | {"images": uint8[:1].expand(3, -1, -1, -1)},
        "colour": base | {"fill": MEAN},
        "colour an image": base | {"fill": torch.rand(3, 3, generator=g)},
        "row": base | {"fill": torch.rand(1, 3, 1, 61, generator=g)},
        "mean colour": base | {"fill": "mean"},
        "noise": base | {"fill": Noise(2**64 - 3, first=2**33)},
        "window": base | {"window": (5, 18), "fill": Noise(7)},
        "one item": base | {"window": (9, 10)},
        "no item": base | {"window": (9, 9)},
        "one image": {k: v[1:2] if isinstance(v, Tensor) else v for k, v in base.items()},
        "one channel": base | {"images": uint8[:, :1], "mean": [0.5], "std": [2.0]},
    }


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", variants())
@pytest.mark.parametrize("threads", [1, 3])
def test_native_equals_the_definition_to_the_last_bit(case: str, dtype: torch.dtype, threads: int) -> None:
    arguments = variants()[case]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with backend("torch"):
            expected = mask_sequence(**arguments, dtype=dtype)
        # NaN wherever the module writes nothing.
        out = torch.full_like(expected, torch.nan)
        with backend("native"):
            assert mask_sequence(**arguments, out=out) is not None
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, expected)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_native_rounds_as_torch_does(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**31), 2**31, 4099, dtype=torch.int64).to(torch.int32).view(torch.float32)
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    for values in (patterns, halves.float(), halves.float().nextafter(torch.tensor(torch.inf)), halves):
        images = values[: len(values) // 8 * 8].view(1, 1, 8, -1)
        with backend("native"):
            ours = mask_sequence(images, torch.zeros_like(images, dtype=torch.int32), [0.0], dtype=dtype)
        torch.testing.assert_close(ours, images.to(dtype), rtol=0, atol=0, equal_nan=True)


@needs_native
def test_native_writes_nothing_outside_the_buffer() -> None:
    images, maps = torch.rand(2, 3, 5, 7), torch.rand(2, 1, 5, 7)
    size = 2 * 3 * 3 * 5 * 7
    memory = torch.full((size + 200,), torch.nan)
    out = memory[101 : 101 + size].view(6, 3, 5, 7)
    with backend("native"):
        mask_sequence(images, maps, [0, 0.5, 1], out=out)
    assert not out.isnan().any()
    assert memory[:101].isnan().all()
    assert memory[101 + size :].isnan().all()


@needs_native
def test_threads_of_the_caller_do_not_disturb_one_another() -> None:
    images, maps = torch.rand(4, 3, 32, 32), torch.rand(4, 2, 32, 32)
    expected = mask_sequence(images, maps, [0, 0.25, 0.5])
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not torch.equal(mask_sequence(images, maps, [0, 0.25, 0.5]), expected):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_uint8_images_become_what_totensor_and_normalize_make_of_them() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3).contiguous()
    prepared = Compose([ToTensor(), Normalize(MEAN, STD)])(Image.fromarray(pixels.numpy()))
    ours = mask_sequence(pixels.permute(2, 0, 1)[None], torch.rand(1, 1, 16, 16), [0.0], mean=MEAN, std=STD)
    assert torch.equal(ours[0], prepared)


def test_the_mean_as_a_colour_is_exactly_zero_after_normalising() -> None:
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    assert not mask_sequence(images, torch.rand(1, 1, 8, 8), [1.0], fill=MEAN, mean=MEAN, std=STD).any()


def test_windows_join_to_the_whole() -> None:
    arguments = variants()["noise"] | {"window": None}
    whole = mask_sequence(**arguments)
    for size in (1, 5, 8, 24):
        parts = [mask_sequence(**arguments | {"window": (i, min(i + size, 24))}) for i in range(0, 24, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_batching_does_not_change_the_noise() -> None:
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    whole = Noise(5).image(images.shape)
    assert torch.equal(Noise(5, first=2).image((1, 3, 4, 4)), whole[2:])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(Noise(5 + 2**32).image(images.shape), whole)


def test_noise_is_uniform_and_uncorrelated() -> None:
    noise = Noise(1).image((16, 3, 64, 64)).double()
    counts = noise.flatten().long().bincount(minlength=256).double()
    n = noise.numel()
    # Chi-squared of 255 degrees of freedom: mean 255, deviation 22.6.
    assert ((counts - n / 256) ** 2 / (n / 256)).sum() < 255 + 5 * 22.6
    planes = (noise.flatten(2).flatten(0, 1) - 127.5) / 73.9
    correlation = planes @ planes.T / planes.shape[1]
    assert correlation.fill_diagonal_(0).abs().max() < 6 / 64


def test_published_noise_never_changes() -> None:
    assert Noise(0).image((1, 2, 1, 4)).flatten().tolist() == [115, 103, 225, 170, 180, 161, 97, 112]
    assert Noise(2**64 - 1, first=5).image((1, 1, 1, 4)).flatten().tolist() == [148, 97, 245, 210]


def test_rank_map_is_stable_and_descending() -> None:
    maps = torch.tensor([[0.0, -0.0, 2.0], [1.0, 2.0, -torch.inf]])
    assert rank_map(maps).tolist() == [[3, 4, 0], [2, 1, 5]]


def test_strided_out_runs_on_the_definition() -> None:
    images, maps = torch.rand(1, 3, 4, 4), torch.rand(1, 1, 4, 4)
    out = torch.empty(2, 4, 4, 3).permute(0, 3, 1, 2)
    expected = mask_sequence(images, maps, [0, 0.5])
    assert mask_sequence(images, maps, [0, 0.5], out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, expected)
    with backend("native"), pytest.raises(BackendError, match="out is not contiguous"):
        mask_sequence(images, maps, [0, 0.5], out=out)


def test_images_that_require_grad_are_read_not_tracked() -> None:
    images = torch.rand(1, 3, 4, 4, requires_grad=True)
    assert not mask_sequence(images, torch.rand(1, 1, 4, 4), [0.5]).requires_grad


def test_no_images_and_no_prompts_give_no_items() -> None:
    assert mask_sequence(torch.rand(0, 3, 4, 4), torch.rand(0, 2, 4, 4), [0.5]).shape == (0, 3, 4, 4)
    assert mask_sequence(torch.rand(2, 3, 4, 4), torch.rand(2, 0, 4, 4), [0.5]).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(3, 4, 4)}, "images must be"),
        ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, "not .* int32"),
        ({"images": torch.rand(2, 3, 0, 4)}, "no pixels"),
        ({"images": torch.rand(1, 1, 1, 1).expand(2, 3, 2**16, 2**15)}, "too large"),
        ({"order": torch.rand(2, 1, 4, 5)}, "order must be"),
        ({"order": torch.rand(1, 1, 4, 4)}, "order must be"),
        ({"order": torch.rand(2, 1, 16)}, "order must be"),
        ({"order": torch.zeros(2, 1, 4, 4, dtype=torch.bool)}, "order must be"),
        ({"order": torch.zeros(2, 1, 16, dtype=torch.int64)}, "every pixel index once"),
        ({"order": torch.arange(1, 17).expand(2, 1, 16)}, "outside 0 .. 15"),
        ({"order": torch.full((2, 1, 4, 4), torch.nan)}, "NaN"),
        ({"order": torch.rand(2, 1, 4, 4, device="meta")}, "one device"),
        ({"fractions": []}, "fractions"),
        ({"fractions": [0.5, 1.1]}, "between 0 and 1"),
        ({"fractions": [torch.nan]}, "between 0 and 1"),
        ({"fractions": torch.rand(2, 2)}, "one dimension"),
        ({"mode": "delete"}, "did you mean 'deletion'"),
        ({"fill": "blur"}, "only fill with a name is 'mean'"),
        ({"fill": [0.0, 1.0]}, "fill must be a number"),
        ({"fill": torch.zeros(3, dtype=torch.int64)}, "uint8 or floating"),
        ({"fill": torch.rand(2, 3, 4, 5)}, "fill must be a number"),
        ({"fill": Noise(-1)}, "seed -1"),
        ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "fill": 128}, "between 0 .black. and 1"),
        ({"mean": [0.5]}, "mean must be 3 finite numbers"),
        ({"std": [1.0, 0.0, 1.0]}, "none of them zero"),
        ({"window": (0, 7)}, r"window \(0, 7\) must lie within 0 .. 6"),
        ({"window": (3, 2)}, "window"),
        ({"out": torch.empty(5, 3, 4, 4)}, r"out must be \(6, 3, 4, 4\)"),
        ({"out": torch.empty(6, 3, 4, 4, dtype=torch.int64)}, "floating"),
        ({"out": torch.empty(6, 3, 4, 4), "dtype": torch.float16}, "float16"),
        ({"out": torch.empty(6, 3, 4, 4, device="meta")}, "one device"),
        ({"dtype": torch.uint8}, "not floating"),
    ],
)
def test_a_wrong_argument_gets_one_clear_sentence(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"images": torch.rand(2, 3, 4, 4), "order": torch.rand(2, 1, 4, 4)}
    arguments |= {"fractions": [0, 0.5, 1]} | change
    with pytest.raises(InputError, match=message) as error:
        mask_sequence(**arguments)
    assert str(error.value).endswith((".", "?"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fill", [torch.rand(2, 3, 6, 5), None], ids=["image", "noise"])
def test_the_operator_is_one_that_torch_library_accepts_and_compiles(fill: torch.Tensor | None) -> None:
    ranks = rank_map(torch.rand(2, 4, 6, 5))
    counts, mean, std = torch.tensor([0, 7, 30], dtype=torch.int32), torch.rand(3), torch.rand(3) + 0.5
    rest = (ranks, fill, -5, 2, counts, mean, std, True, 3, 20)
    images = torch.rand(2, 3, 6, 5)
    operator = torch.ops.clipfast.mask_sequence.default
    torch.library.opcheck(operator, (images, *rest, torch.zeros(17, 3, 6, 5)))

    def doubled(images: torch.Tensor) -> torch.Tensor:
        out = images.new_empty(17, 3, 6, 5)
        operator(images * 2, *rest, out)
        return out + 1

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), doubled(images))
