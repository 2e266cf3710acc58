"""The geometry of editing, with painters made of a few lines in place of a model."""

import pytest
import torch

from maskgit import editing
from maskgit.common import UserError


def box(height, width, *rectangles):
    """A mask (1, 1, H, W) with rectangles (top, left, height, width) set."""
    mask = torch.zeros(1, 1, height, width, dtype=torch.bool)
    for top, left, h, w in rectangles:
        mask[..., top : top + h, left : left + w] = True
    return mask


def random_image(height, width, batch=1, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_one_masked_pixel_masks_its_token():
    mask = box(16, 24, (7, 8, 1, 1))
    assert editing.token_mask(mask, 8).nonzero().tolist() == [[0, 0, 1]]


def test_dilation_counts_tokens_in_all_directions():
    mask = box(40, 40, (16, 16, 1, 1))
    for dilate in range(3):
        cells = editing.token_mask(mask, 8, dilate)
        assert cells.sum() == (2 * dilate + 1) ** 2
        assert cells[0, 2 - dilate, 2 - dilate] and cells[0, 2 + dilate, 2 + dilate]


def test_fill_keeps_the_known_and_stays_between_them():
    image = random_image(13, 21, batch=2)
    known = ~box(13, 21, (2, 3, 8, 15)).expand(2, -1, -1, -1).clone()
    known[1, :, 0] = False
    filled = editing.fill(image, known)
    assert torch.equal(filled[known.expand_as(image)], image[known.expand_as(image)])
    for i in range(2):
        seen = image[i][:, known[i, 0]]
        assert (filled[i].flatten(1).amin(1) >= seen.amin(1) - 1e-5).all()
        assert (filled[i].flatten(1).amax(1) <= seen.amax(1) + 1e-5).all()
        alone = editing.fill(image[i : i + 1], known[i : i + 1])
        assert torch.equal(alone[0], filled[i])


def test_fill_follows_a_gradient_and_copes_with_nothing():
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    hole = box(32, 32, (8, 8, 16, 16))
    filled = editing.fill(ramp, ~hole)
    left, right = filled[0, 0, 16, 9], filled[0, 0, 16, 22]
    assert left < 0.45 < 0.55 < right
    assert (editing.fill(ramp, torch.zeros_like(hole)) == 0).all()


def test_feather_rises_inside_the_mask_only():
    mask = box(12, 12, (2, 0, 8, 12))  # touches the left and the right border of the image
    weight = editing.feathered(mask, 2)
    column = weight[0, 0, :, 0]
    expected = torch.tensor([0, 0, 1, 2, 3, 3, 3, 3, 2, 1, 0, 0]) / 3
    assert torch.allclose(column, expected)
    assert torch.equal(weight[0, 0, :, 5], column)
    assert torch.equal(editing.feathered(mask, 0), mask.float())


def test_paste_is_exact_outside_and_meets_the_colour_at_the_edge():
    image = random_image(16, 16)
    mask = box(16, 16, (4, 4, 8, 8))
    plain = editing.paste(image, torch.ones_like(image), mask, 0)
    assert torch.equal(plain, torch.where(mask, 1.0, image))
    dark, light = torch.full_like(image, 0.3), torch.full_like(image, 0.5)
    soft = editing.paste(dark, light, mask, 3)
    assert torch.equal(soft[~mask.expand_as(soft)], dark[~mask.expand_as(soft)])
    edge_to_middle = soft[0, 0, 4:8, 8]
    assert (edge_to_middle.diff() > 0).all()
    assert edge_to_middle[0] == pytest.approx(0.35) and edge_to_middle[3] == pytest.approx(0.5)


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (5, 3), (5, 33)])
def test_canvas_holds_the_image_on_whole_cells(size):
    image, mask = random_image(*size), box(*size, (0, 0, 2, 2))
    canvas = editing.lay(image, mask, (16, 16), 4)
    rows, columns = canvas.place
    assert torch.equal(canvas.image[..., rows, columns], image)
    assert torch.equal(canvas.mask[..., rows, columns], mask)
    for side, place in zip(canvas.image.shape[-2:], canvas.place, strict=True):
        assert side % 4 == 0 and side >= 16 and place.start % 4 == 0
    inside = torch.zeros_like(canvas.free)
    inside[..., rows, columns] = True
    assert not (canvas.free & inside).any()
    free = editing.token_mask(canvas.free, 4)
    assert torch.equal(free, ~editing.token_mask(inside, 4))  # free cells are free as a whole


def test_a_hole_is_painted_in_one_window_around_it():
    cells = torch.zeros(40, 50, dtype=torch.bool)
    cells[20:23, 30:34] = True
    [(top, left)] = editing.plan_windows(cells, (8, 8))
    assert abs(top + 4 - 21.5) <= 0.5 and left + 4 == 32


def test_growing_windows_are_half_known():
    cells = torch.ones(8, 24, dtype=torch.bool)
    cells[:, :8] = False
    assert editing.plan_windows(cells, (8, 8)) == [(0, 4), (0, 8), (0, 12), (0, 16)]


@pytest.mark.parametrize("seed", range(20))
def test_windows_cover_whatever_is_to_paint(seed):
    random = torch.Generator().manual_seed(seed)
    h, w = torch.randint(4, 30, (2,), generator=random).tolist()
    cells = torch.rand(h, w, generator=random) < 0.05 * seed / 2
    left_over = cells.clone()
    for top, left in editing.plan_windows(cells, (4, 3)):
        assert 0 <= top <= h - 4 and 0 <= left <= w - 3
        view = left_over[top : top + 4, left : left + 3]
        assert view.any()  # no window for nothing
        view[:] = False
    assert not left_over.any()


def test_windows_have_seeds_of_their_own():
    seeds = {editing.window_seed(seed, index) for seed in range(-50, 50) for index in range(50)}
    assert len(seeds) == 5000
    assert editing.window_seed(7, 0) == 7
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)


def brighter(views, unknown, rows, turn):
    """Paint the mean of what is known, plus 0.1: a value that tells what the window saw."""
    known = torch.where(unknown, 0, views).sum((1, 2, 3)) / (~unknown).sum((1, 2, 3)) / 3
    return (known + 0.1)[:, None, None, None].expand_as(views)


def test_later_windows_see_the_earlier_ones():
    image, mask = editing.extend(torch.zeros(1, 3, 16, 16), 0, 32, 0, 0)
    out = editing.paint_in_windows(brighter, image, mask, (16, 16), 4, 0)
    across = out[0, 0, 8]
    assert torch.equal(across[:16], torch.zeros(16))
    assert (across[16:].diff() >= 0).all() and len(across[16:].unique()) == 4


@pytest.mark.parametrize("size", [(16, 16), (9, 7), (37, 16), (50, 33), (7, 41)])
def test_any_size_is_painted_inside_the_mask_alone(size):
    image = random_image(*size)
    before = image.clone()
    mask = box(*size, (1, 0, 4, 5), (size[0] - 2, size[1] - 3, 2, 3))
    arguments = (lambda views, *_: views * 0 + 2, image, mask, (16, 16), 4, 0)
    painted = editing.paint_in_windows(*arguments)
    assert torch.equal(painted, torch.where(mask, 1.0, image))  # 2, clamped
    resized = editing.paint_in_one(*arguments)
    assert torch.equal(resized == image, ~mask.expand_as(image))
    assert torch.equal(image, before)


def test_images_of_a_batch_are_painted_as_if_alone():
    images = random_image(40, 48, batch=3)
    masks = torch.cat([box(40, 48, (0, 0, 30, 30)), box(40, 48), box(40, 48, (20, 40, 3, 3))])
    together = editing.paint_in_windows(brighter, images, masks, (16, 16), 4, 2)
    for i in range(3):
        one = slice(i, i + 1)
        alone = editing.paint_in_windows(brighter, images[one], masks[one], (16, 16), 4, 2)
        assert torch.equal(alone[0], together[i])
    assert torch.equal(together[1], images[1])


def test_the_surroundings_of_a_mask_decide_how_it_is_filled():
    image, mask = random_image(150, 131), box(150, 131, (70, 60, 21, 9))
    whole = editing.paint_in_windows(brighter, image, mask, (16, 16), 4, 2)
    rows, columns = editing.surroundings(mask[0, 0], (16, 16), 4)
    assert rows.stop - rows.start < 64 and columns.stop - columns.start < 64
    part = (slice(None), slice(None), rows, columns)
    alone = editing.paint_in_windows(brighter, image[part], mask[part], (16, 16), 4, 2)
    assert torch.equal(alone, whole[part])


def test_what_does_not_fit_is_refused():
    image, mask = random_image(16, 16, batch=2), box(16, 16)
    assert editing.check(image, mask.float(), 0, 0).shape == (2, 1, 16, 16)
    for images, masks, dilate in [
        (image[0], mask, 0),
        (image * 255, mask, 0),
        (image * torch.nan, mask, 0),
        (image.byte(), mask, 0),
        (image, mask[..., :8], 0),
        (image, mask.expand(3, -1, -1, -1), 0),
        (image, mask, -1),
    ]:
        with pytest.raises(UserError):
            editing.check(images, masks, dilate, 0)
    with pytest.raises(UserError):
        editing.extend(image, 1, -1, 0, 0)
