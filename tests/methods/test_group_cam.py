"""Group-CAM against the authors' algorithm on the module itself, group by group."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clipfast.errors import InputError
from clipfast.methods.group_cam import GroupCam
from clipfast.models.openclip import image_tower
from clipfast.models.resnet import resnet_tower


def gaussian(x, kernel, sigma):
    """A depthwise convolution of the picture with reflected borders."""
    taps = torch.exp(-((torch.arange(kernel, dtype=x.dtype) - kernel // 2) ** 2) / (2 * sigma**2))
    window = taps[:, None] * taps
    window = (window / window.sum()).expand(3, 1, -1, -1)
    return F.conv2d(F.pad(x, [kernel // 2] * 4, mode="reflect"), window, groups=3)


def read_features(model, x):
    kept = {}
    if hasattr(model.visual, "transformer"):
        hook = model.visual.transformer.resblocks[-1].register_forward_pre_hook(lambda _, g: kept.update(at=g[0]))
    else:
        hook = model.visual.layer4.register_forward_hook(lambda _, g, made: kept.update(at=made))
    z = F.normalize(model.encode_image(x), dim=-1)
    hook.remove()
    return kept["at"], z


def naive(model, x, text, groups, kernel, sigma):
    at, z = read_features(model, x)
    gradient = torch.autograd.grad((z @ text).sum(), at)[0]
    if hasattr(model.visual, "transformer"):
        at, gradient = (t[:, 1:].mT.unflatten(-1, (x.shape[2] // 16, x.shape[3] // 16)) for t in (at, gradient))
    weighted = at.detach() * gradient.mean((2, 3), keepdim=True)
    blurred = gaussian(x, kernel, sigma)

    def score(y):
        with torch.no_grad():
            return float(F.normalize(model.encode_image(y), dim=-1)[0] @ text)

    total = torch.zeros_like(weighted[0, 0])
    pictures = torch.zeros_like(x[0, 0])
    for part in weighted.chunk(groups, 1):
        group = part.sum(1, keepdim=True).relu()
        up = F.interpolate(group, size=x.shape[-2:], mode="bilinear", align_corners=False)
        if up.max() == up.min():
            continue
        mask = (up - up.min()) / (up.max() - up.min())
        gain = score(x * mask + blurred * (1 - mask)) - score(blurred)
        pictures += gain * mask[0, 0]
        total += gain * ((group - up.min()) / (up.max() - up.min()))[0, 0]
    # The sum at the layer's places, brought up, is the authors' sum of pictures.
    up = F.interpolate(total[None, None], size=x.shape[-2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(up[0, 0], pictures, rtol=0, atol=1e-12)
    return total.relu()


@pytest.mark.parametrize(("kind", "size"), [("transformer", (64, 64)), ("transformer", (48, 80)), ("resnet", (96, 96))])
@pytest.mark.parametrize(("groups", "kernel", "sigma"), [(4, 51, 50.0), (8, 9, 2.0)])
def test_maps_equal_the_authors_algorithm(build_clip, build_resnet, kind, size, groups, kernel, sigma):
    if kind == "resnet":
        model = build_resnet(image_size=size[0], width=4).double()
        tower = resnet_tower(model)
    else:
        model = build_clip(image_size=size, quick_gelu=True, ls_init_value=0.5).double()
        tower = image_tower(model)
    x = F.interpolate(torch.randn(2, 3, 6, 6, dtype=torch.float64), size=size, mode="bilinear")
    texts = F.normalize(torch.randn(3, 24, dtype=torch.float64), dim=-1)
    explained = GroupCam(groups=groups, kernel=kernel, sigma=sigma).image(tower, x)
    maps = explained.maps(texts)
    assert maps.amax() > 0
    for b in range(2):
        for t in range(3):
            expected = naive(model, x[b : b + 1], texts[t], groups, kernel, sigma)
            torch.testing.assert_close(maps[b, t], expected.flatten(), rtol=0, atol=1e-10)
    own = torch.stack((texts[[1, 0]], texts[[2, 2]]))
    torch.testing.assert_close(explained.maps(own), torch.stack((maps[0, [1, 0]], maps[1, [2, 2]])))


def test_a_picture_smaller_than_the_kernel_is_mirrored_over_and_over():
    x = torch.randn(1, 3, 7, 40, dtype=torch.float64)
    again = F.pad(x, [0, 0, 6, 6], mode="reflect")
    for _ in range(4):
        again = F.pad(again, [0, 0, 6, 6], mode="reflect")
    again = F.pad(again, [25, 25, 0, 0], mode="reflect")
    found = gaussian(F.pad(again, [25, 25, 0, 0], mode="reflect"), 51, 50.0)
    torch.testing.assert_close(GroupCam().blur(x), found[..., 30:37, 50:90])


def test_more_groups_than_channels(build_clip):
    tower, x = image_tower(build_clip().double()), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    text = F.normalize(torch.randn(1, 24, dtype=torch.float64), dim=-1)
    maps = [GroupCam(groups=groups).image(tower, x).maps(text) for groups in (32, 100)]
    assert torch.equal(*maps) and maps[0].isfinite().all()


def test_an_image_that_is_its_own_blur_gains_nothing(build_clip):
    tower, x = image_tower(build_clip().double()), torch.full((1, 3, 64, 64), 0.7, dtype=torch.float64)
    text = F.normalize(torch.randn(1, 24, dtype=torch.float64), dim=-1)
    assert GroupCam().image(tower, x).maps(text).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"groups": 0}, "groups=0"), ({"kernel": 50}, "kernel=50 must be odd"), ({"sigma": 0}, "sigma=0 above zero")],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(InputError, match=message):
        GroupCam(**parameters)
