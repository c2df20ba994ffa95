"""RandAugment changes a clip as timm's rand-m9-mstd0.5-inc1 changes a picture."""

import pytest
import torch
import torch.nn.functional as F

import finetune_cls

H, W = 32, 48
Y, X = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")


def ramps(y, x):
    """Red tells the column; green, the row, has all 256 values; blue is not known."""
    return torch.stack([17 + 5 * x, (8 * y - 4 + x / 6).floor(), torch.full_like(x, torch.nan)])


PICTURE = torch.stack([*ramps(Y, X)[:2], 40 + 200 * ((X + Y) % 2)])
RED, GREEN, BLUE = PICTURE
DARKEST, BRIGHTEST = PICTURE.amin((1, 2), True), PICTURE.amax((1, 2), True)
LUMA = 0.299 * RED + 0.587 * GREEN + 0.114 * BLUE
KERNEL = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]).expand(3, 1, 3, 3) / 13
BLURRED = F.pad(F.conv2d(PICTURE, KERNEL, groups=3), (1, 1, 1, 1), value=torch.nan)


def blend(other, amount):
    return other + (PICTURE - other) * (1 + amount)


def from_places(y, x):
    """What lies at these places of the picture; grey outside, not known at the border."""
    outside = torch.maximum((x - W / 2).abs() - W / 2, (y - H / 2).abs() - H / 2)
    border = torch.where(outside.abs() < 1, torch.nan, 0)
    return torch.where(outside > 0, 128, ramps(y, x)) + border


def rotated(degrees):
    turn = torch.polar(torch.tensor(1.0), torch.tensor(degrees).deg2rad())
    places = torch.complex(X - W / 2, Y - H / 2) * turn
    return from_places(places.imag + H / 2, places.real + W / 2)


MAGNITUDES = (0, 5, 9, 10)
ALWAYS = (None,) * 4
FACTORS = (0.0, 0.45, 0.81, 0.9)
SLOPES = (0.0, 0.15, 0.27, 0.3)
SHIFTS = (0.0, 0.225, 0.405, 0.45)
ONE_WAY = {  # name: its amounts at these magnitudes, and what an amount makes of the picture
    "AutoContrast": (ALWAYS, lambda _: (PICTURE - DARKEST) * 255 / (BRIGHTEST - DARKEST)),
    "Equalize": (ALWAYS, lambda _: torch.stack([(32 * X - 14) // 5, GREEN, 255.0 * (BLUE > 40)])),
    "Invert": (ALWAYS, lambda _: 255 - PICTURE),
    "Posterize": ((4, 2, 1, 0), lambda bits: PICTURE // 2 ** (8 - bits) * 2 ** (8 - bits)),
    "Solarize": ((256, 128, 26, 0), lambda t: PICTURE.where(PICTURE.lt(t), 255 - PICTURE)),
    "SolarizeAdd": ((0, 55, 99, 110), lambda add: PICTURE + add * (PICTURE < 128)),
}
BOTH_WAYS = {
    "Rotate": ((0.0, 15.0, 27.0, 30.0), rotated),
    "Color": (FACTORS, lambda factor: blend(LUMA, factor)),
    "Contrast": (FACTORS, lambda factor: blend(LUMA.mean(), factor)),
    "Brightness": (FACTORS, lambda factor: blend(0, factor)),
    "Sharpness": (FACTORS, lambda factor: blend(BLURRED, factor)),
    "ShearX": (SLOPES, lambda slope: from_places(Y, X + slope * Y)),
    "ShearY": (SLOPES, lambda slope: from_places(Y + slope * X, X)),
    "TranslateX": (SHIFTS, lambda share: from_places(Y, X + share * W)),
    "TranslateY": (SHIFTS, lambda share: from_places(Y + share * H, X)),
}
OPERATIONS = ONE_WAY | BOTH_WAYS


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_as_strong_as_its_magnitude_says(name, magnitude, sign):
    m, clip = magnitude / 10, PICTURE.byte()[None]
    result = finetune_cls.RAND_AUGMENT[name](clip, sign * m)[0]
    amounts, expected = OPERATIONS[name]
    amount = amounts[MAGNITUDES.index(magnitude)]
    wanted = expected(sign * amount if name in BOTH_WAYS else amount)
    if name in ("Rotate", "TranslateX", "TranslateY"):  # which way is which does not matter
        wanted = expected(-sign * amount)
    error = (result - wanted.clamp(0, 255)).nan_to_num(0).abs()
    assert error.max() < 2.1  # rounding, of greys as well


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

    def noting(name):
        return lambda clip, signed: calls[-1].append((name, 10 * signed)) or clip

    monkeypatch.setattr(finetune_cls, "RAND_AUGMENT", {name: noting(name) for name in OPERATIONS})
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
    first, second = torch.tensor([[abs(m) for _, m in call] for call in calls if len(call) == 2]).T
    assert (first != second).float().mean() > 0.95  # both are clipped now and then
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.15
