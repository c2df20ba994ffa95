"""RandAugment changes a clip as timm's rand-m9-mstd0.5-inc1 changes a picture, with Pillow."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor

import finetune_cls

H, W = 64, 96
NOISE = np.random.RandomState(0).rand(H, W, 3) ** 2  # more dark pixels than bright ones
PICTURE = Image.fromarray(([40, 0, 17] + [180, 256, 200] * NOISE).astype(np.uint8))
GREY_OUTSIDE = dict(resample=Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))


def warp(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, **GREY_OUTSIDE)


ALWAYS = (None,) * 4
FACTORS = (0.0, 0.45, 0.81, 0.9)
SLOPES = (0.0, 0.15, 0.27, 0.3)
SHIFTS = (0.0, 0.225, 0.405, 0.45)
ONE_WAY = {  # name: its amounts at magnitudes 0, 5, 9 and 10, and what an amount makes of a picture
    "AutoContrast": (ALWAYS, lambda image, _: ImageOps.autocontrast(image)),
    "Equalize": (ALWAYS, lambda image, _: ImageOps.equalize(image)),
    "Invert": (ALWAYS, lambda image, _: ImageOps.invert(image)),
    "Posterize": ((16, 64, 128, 256), lambda image, n: image.point(lambda v: v // n * n)),
    "Solarize": ((256, 128, 26, 0), ImageOps.solarize),
    "SolarizeAdd": ((0, 55, 99, 110), lambda image, n: image.point(lambda v: v + n * (v < 128))),
}
ENHANCED = {
    "Color": (FACTORS, lambda image, more: ImageEnhance.Color(image).enhance(1 + more)),
    "Contrast": (FACTORS, lambda image, more: ImageEnhance.Contrast(image).enhance(1 + more)),
    "Brightness": (FACTORS, lambda image, more: ImageEnhance.Brightness(image).enhance(1 + more)),
    "Sharpness": (FACTORS, lambda image, more: ImageEnhance.Sharpness(image).enhance(1 + more)),
}
WARPED = {
    "Rotate": ((0, -15, -27, -30), lambda image, degrees: image.rotate(degrees, **GREY_OUTSIDE)),
    "ShearX": (SLOPES, lambda image, slope: warp(image, 1, slope, 0, 0, 1, 0)),
    "ShearY": (SLOPES, lambda image, slope: warp(image, 1, 0, 0, slope, 1, 0)),
    "TranslateX": (SHIFTS, lambda image, share: warp(image, 1, 0, -W * share, 0, 1, 0)),
    "TranslateY": (SHIFTS, lambda image, share: warp(image, 1, 0, 0, 0, 1, -H * share)),
}
OPERATIONS = ONE_WAY | ENHANCED | WARPED


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_as_strong_as_its_magnitude_says(name):
    clip, (amounts, change) = pil_to_tensor(PICTURE)[None], OPERATIONS[name]
    for (magnitude, amount), sign in itertools.product(zip((0, 5, 9, 10), amounts), (1, -1)):
        wanted = change(PICTURE, amount if name in ONE_WAY else sign * amount)
        result = finetune_cls.RAND_AUGMENT[name](clip, sign * magnitude / 10)[0]
        wrong = (result.int() - pil_to_tensor(wanted).int()).abs() > 2  # more than rounding
        assert wrong.float().mean() <= (0.03 if name in WARPED else 0)  # at borders to grey


def test_all_frames_of_a_clip_are_changed_alike():
    torch.manual_seed(0)
    clip = torch.randint(256, (4, 24, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)  # as decoded
    augment = finetune_cls.RandAugment(9, 0.5)
    for seed in range(60):
        torch.manual_seed(seed)
        result = augment(clip)
        assert (result.shape, result.dtype) == (clip.shape, torch.uint8)
        for frame, alone in zip(result, clip):
            torch.manual_seed(seed)
            assert torch.equal(frame, augment(alone[None])[0])


def test_two_operations_are_drawn_with_replacement_each_at_a_magnitude_of_its_own(monkeypatch):
    """4000 calls; each applies an operation half the time, at normal(9, 0.5), clipped at 10."""
    calls = []  # for each a list of (operation, magnitude with its sign)
    for name in OPERATIONS:
        note = lambda clip, s, name=name: calls[-1].append((name, 10 * s)) or clip  # noqa: E731
        monkeypatch.setitem(finetune_cls.RAND_AUGMENT, name, note)
    torch.manual_seed(0)
    for _ in range(4000):
        calls.append([])
        finetune_cls.RandAugment(9, 0.5)(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    for count, share in enumerate((0.25, 0.5, 0.25)):
        assert sum(len(call) == count for call in calls) / 4000 == pytest.approx(share, abs=0.03)
    names = [name for call in calls for name, _ in call]
    for name in OPERATIONS:
        assert names.count(name) / len(names) == pytest.approx(1 / 15, abs=0.015)
    pairs = [call for call in calls if len(call) == 2]
    assert sum(a[0] == b[0] for a, b in pairs) / len(pairs) == pytest.approx(1 / 15, abs=0.03)

    magnitudes = torch.tensor([magnitude for call in calls for _, magnitude in call])
    assert (magnitudes < 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert magnitudes.abs().median().item() == pytest.approx(9, abs=0.05)
    assert magnitudes.abs().quantile(0.16).item() == pytest.approx(8.5, abs=0.05)
    assert magnitudes.abs().max() == 10
    both = torch.tensor([[abs(magnitude) for _, magnitude in pair] for pair in pairs])
    assert torch.corrcoef(both.T)[0, 1].abs() < 0.15
