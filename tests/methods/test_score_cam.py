"""Score-CAM and gScoreCAM against loops over channels on the module itself, and against pytorch-grad-cam."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pytorch_grad_cam import ScoreCAM as LibraryScoreCam
from torch import nn

from clipfast.errors import InputError
from clipfast.methods import score_cam
from clipfast.methods.score_cam import GScoreCam, ScoreCam, encode_channels
from clipfast.models.openclip import image_tower
from clipfast.models.resnet import resnet_tower


def read_layer(model, x, layer):
    """(features (1, C, h, w) in the graph, embedding (1, E)): at a block of a transformer or a stage of a ResNet."""
    kept = {}
    if hasattr(model.visual, "transformer"):
        module = model.visual.transformer.resblocks[layer]
        grid = (x.shape[2] // 16, x.shape[3] // 16)
        hook = module.register_forward_pre_hook(lambda _, given: kept.update(at=given[0]))
    else:
        module = model.visual.layer4 if layer == -1 else model.visual.layer3
        hook = module.register_forward_hook(lambda _, given, made: kept.update(at=made))
    z = F.normalize(model.encode_image(x), dim=-1)
    hook.remove()
    if hasattr(model.visual, "transformer"):
        return kept["at"], lambda t: t[:, 1:].mT.unflatten(-1, grid), z
    return kept["at"], lambda t: t, z


def naive(model, x, text, layer=-1, top=None):
    """One image, one prompt, one channel at a time; nothing here is clipfast's."""
    at, as_picture, z = read_layer(model, x, layer)
    gradient = as_picture(torch.autograd.grad((z @ text).sum(), at)[0])[0]
    features = as_picture(at)[0].detach()
    count = len(features)
    scale = float(model.logit_scale.detach().exp())
    chosen = range(count) if top is None else gradient.mean((1, 2)).argsort(descending=True)[:top].tolist()
    logits = torch.zeros(count, dtype=x.dtype)
    with torch.no_grad():
        for c in chosen:
            up = nn.UpsamplingBilinear2d(x.shape[-2:])(features[c][None, None])
            span = up.max() - up.min()
            mask = (up - up.min()) / span if span > 0 else torch.zeros_like(up)
            logits[c] = scale * (F.normalize(model.encode_image(x * mask), dim=-1) @ text)
    return (logits.softmax(0)[:, None, None] * features).sum(0).relu()


TOWERS = [("transformer", (64, 64)), ("transformer", (48, 80)), ("resnet", (96, 96))]


@pytest.fixture
def built(request, build_clip, build_resnet):
    kind, size = request.param
    if kind == "resnet":
        model = build_resnet(image_size=size[0], width=4).double()
        return model, resnet_tower(model), size
    model = build_clip(image_size=size, quick_gelu=True, ls_init_value=0.5).double()
    return model, image_tower(model), size


@pytest.mark.parametrize("built", TOWERS, indirect=True, ids=str)
@pytest.mark.parametrize(("top", "layer"), [(None, -1), (5, -1), (300, -1), (7, 1)], ids=str)
def test_maps_equal_a_loop_over_channels(built, top, layer):
    model, tower, size = built
    if layer == 1 and hasattr(model.visual, "layer3"):
        layer = "layer3"
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    texts = F.normalize(torch.randn(2, 24, dtype=torch.float64), dim=-1)
    method = ScoreCam(layer=layer) if top is None else GScoreCam(layer=layer, top=top)
    explained = method.image(tower, x)
    maps = explained.maps(texts)
    assert maps.shape[-1] == method.grid(tower, size)[0] * method.grid(tower, size)[1]
    for b in range(2):
        for t in range(2):
            expected = naive(model, x[b : b + 1], texts[t], layer, top)
            torch.testing.assert_close(maps[b, t], expected.flatten(), rtol=0, atol=1e-10)
    own = torch.stack((texts[[1, 0]], texts[[0, 0]]))
    torch.testing.assert_close(explained.maps(own), torch.stack((maps[0, [1, 0]], maps[1, [0, 0]])))


def test_channels_that_prompts_share_are_encoded_once(build_clip, monkeypatch):
    tower = image_tower(build_clip().double())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    texts = F.normalize(torch.randn(6, 24, dtype=torch.float64), dim=-1)
    explained = GScoreCam(top=10).image(tower, x)
    encoded = []

    def counting(tower, x, features, images, channels):
        encoded.extend(zip(images.tolist(), channels.tolist(), strict=True))
        return encode_channels(tower, x, features, images, channels)

    monkeypatch.setattr(score_cam, "encode_channels", counting)
    explained.maps(texts)
    best = explained.channels.mean_gradient(texts).topk(10).indices
    assert len(set(encoded)) == len(encoded) < 2 * 6 * 10
    assert set(encoded) == {(b, c) for b in range(2) for c in best[b].flatten().tolist()}


@pytest.mark.parametrize("built", TOWERS, indirect=True, ids=str)
def test_score_cam_is_the_librarys(built):
    """pytorch-grad-cam as released, picture and all; it computes scores in float32."""
    model, tower, size = built
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    texts = F.normalize(torch.randn(2, 24, dtype=torch.float64), dim=-1)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.clip = model

        def forward(self, x):
            return self.clip.logit_scale.exp() * F.normalize(self.clip.encode_image(x), dim=-1) @ texts.T

    if hasattr(model.visual, "transformer"):
        grid = (size[0] // 16, size[1] // 16)
        layer, places = model.visual.transformer.resblocks[-2], lambda t: t[:, 1:].mT.unflatten(-1, grid)
    else:
        grid, layer, places = (size[0] // 32, size[1] // 32), model.visual.layer4, None
    maps = ScoreCam().image(tower, x).maps(texts)[0]
    with LibraryScoreCam(Logits(), [layer], reshape_transform=places) as cam:
        for t in range(2):
            found = torch.from_numpy(cam(x, [lambda logits, t=t: logits[t]]))[0].double()
            expected = F.interpolate(unit(maps[t]).view(1, 1, *grid), size=size, mode="bilinear", align_corners=False)
            assert (unit(expected.flatten()) - found.flatten()).norm() / found.norm() < 1e-5


def unit(x):
    return (x - x.min()) / (x.max() - x.min())


def test_a_constant_channel_hides_the_image(build_clip):
    model = build_clip().double()
    tower = image_tower(model)
    x = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    model.visual.positional_embedding.data.zero_()
    explained = ScoreCam().image(tower, x)
    torch.testing.assert_close(explained.masked[0], tower.encode(x).expand(32, -1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GScoreCam(top=0), "top=0"),
        (lambda: GScoreCam(top=2.5), "top=2.5"),
    ],
)
def test_bad_parameters(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_layers_that_there_are_not(build_clip):
    for layer in (3, -4, "layer4"):
        with pytest.raises(InputError, match=f"layer={layer!r} is no block of this tower of 3"):
            ScoreCam(layer=layer).image(image_tower(build_clip()), torch.randn(1, 3, 64, 64))
