"""Codebook lookup and how a codebook learns, against formulas written out here."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from runs import pair

from vqgan.codebook import CodebookAverage, entropy_loss, kmeans, mean_distribution, usage
from vqgan.losses import adaptive_weight
from vqgan.quantizer import Quantizer, QuantizerConfig


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def quantizer(normalize=False, codes=24, dim=5):
    """A quantizer whose codes have unlike lengths, so that normalizing matters."""
    made = Quantizer(QuantizerConfig(codes, dim, normalize))
    with torch.no_grad():
        made.codebook.copy_(torch.randn(codes, dim) * torch.rand(codes, 1).mul(3).add(0.2))
    return made


def brute_force(z, codebook, normalize):
    """Token by token, in float64: the code at the least distance, or the greatest cosine."""
    tokens = torch.empty(z.shape[0], *z.shape[2:], dtype=torch.int64)
    codebook = codebook.detach().double()
    for b, i, j in torch.cartesian_prod(*(torch.arange(n) for n in tokens.shape)).tolist():
        row = z[b, :, i, j].double()
        if normalize:
            scores = F.cosine_similarity(codebook, row[None])
        else:
            scores = -(codebook - row).norm(dim=1)
        tokens[b, i, j] = scores.argmax()
    return tokens


@pytest.mark.parametrize("normalize", [False, True])
def test_lookup_equals_brute_force(normalize):
    q, z = quantizer(normalize), torch.randn(2, 5, 3, 7)
    expected = brute_force(z, q.codebook, normalize)
    assert torch.equal(q.lookup(z), expected)
    assert not torch.equal(expected, brute_force(z, q.codebook, not normalize))


def test_lookup_is_float32_whatever_surrounds_it():
    q, z = quantizer(codes=512), torch.randn(4, 5, 16, 16)
    expected = q.lookup(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(q.lookup(z), expected)
    half = z.bfloat16()
    assert torch.equal(q.lookup(half), q.lookup(half.float()))


@pytest.mark.parametrize("normalize", [False, True])
def test_tokens_survive_the_round_trip(normalize):
    q = quantizer(normalize, codes=300)
    tokens = torch.arange(300).view(2, 10, 15)
    codes = q.embed(tokens)
    assert codes.shape == (2, 5, 10, 15)
    assert torch.equal(q.lookup(codes), tokens)
    lengths = codes.norm(dim=1)
    assert torch.allclose(lengths, torch.ones(())) == normalize


def test_straight_through():
    q, z = quantizer(), torch.randn(2, 5, 3, 4, requires_grad=True)
    codes, tokens, _ = q(z)
    assert torch.allclose(codes, q.embed(tokens), atol=1e-6)
    weights = torch.randn_like(codes)
    (codes * weights).sum().backward()
    assert torch.equal(z.grad, weights)
    assert q.codebook.grad is None  # the decoder's gradient goes past the codebook


def test_straight_through_to_the_unit_sphere():
    q, z = quantizer(normalize=True), torch.randn(2, 5, 3, 4, requires_grad=True)
    codes, tokens, _ = q(z)
    assert torch.allclose(codes, q.embed(tokens), atol=1e-6)
    weights = torch.randn_like(codes)
    (codes * weights).sum().backward()
    (expected,) = torch.autograd.grad((F.normalize(z, dim=1) * weights).sum(), z)
    assert torch.allclose(z.grad, expected, atol=1e-6)


@pytest.mark.parametrize("swapped", [False, True])
def test_commitment(swapped):
    """beta weighs the pull of the latents to their codes; published code has it on the other."""
    q, z, beta = quantizer(), torch.randn(2, 5, 3, 4, requires_grad=True), 0.25
    _, tokens, loss = q(z, beta=beta, swapped=swapped)
    loss.backward()
    rows = z.detach().permute(0, 2, 3, 1).flatten(0, 2)
    gap = rows - q.codebook.detach()[tokens.flatten()]
    assert loss.item() == pytest.approx((1 + beta) * gap.square().mean().item(), rel=1e-5)

    to_latents, to_codes = (1, beta) if swapped else (beta, 1)
    expected = (2 * to_latents / gap.numel() * gap).view(2, 3, 4, 5).permute(0, 3, 1, 2)
    assert torch.allclose(z.grad, expected, atol=1e-7)
    expected = torch.zeros_like(q.codebook).index_add(0, tokens.flatten(), gap)
    assert torch.allclose(q.codebook.grad, -2 * to_codes / gap.numel() * expected, atol=1e-7)


def test_moving_average_closed_form():
    """After n steps, a code's sum is d^n s0 + (1 - d) times the sum of d^(n - 1 - i) s_i."""
    codes, steps, decay = 6, 5, 0.9
    codebook = torch.randn(codes, 3)
    average = CodebookAverage(codebook, decay)
    count, total = torch.ones(codes).double() * decay**steps, codebook.double() * decay**steps
    for i in range(steps):
        rows, ids = torch.randn(40, 3), torch.randint(codes - 1, (40,))  # the last is never hit
        average.update(codebook, rows, ids)
        hits = F.one_hot(ids, codes).double()
        weight = (1 - decay) * decay ** (steps - 1 - i)
        count += weight * hits.sum(0)
        total += weight * hits.T @ rows.double()
    assert torch.allclose(average.count.double(), count, atol=1e-6)
    assert torch.allclose(codebook.double(), total / count[:, None], atol=1e-5)


def test_a_code_without_hits_stays_where_it_is():
    codebook = torch.randn(3, 2)
    average, before = CodebookAverage(codebook), codebook.clone()
    for _ in range(2000):
        average.update(codebook, torch.randn(4, 2), torch.tensor([0, 0, 1, 1]))
    assert torch.allclose(codebook[2], before[2], atol=1e-4)


def test_kmeans_finds_the_groups_of_several_batches():
    """Each batch shows one group only, so a start from a single one would miss the others."""
    groups = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0], [8.0, 8.0]])
    batches = [centre + 0.1 * torch.randn(50, 2) for centre in groups]
    rows = torch.cat(batches)
    best = float("inf")
    for _ in range(5):  # Lloyd's algorithm may end in a local optimum
        centres, count = kmeans(rows, 4)
        assert count.sum() == len(rows)
        best = min(best, torch.cdist(centres, groups).min(1).values.max().item())
        ids = torch.cdist(rows, centres).argmin(1)
        means = torch.stack([rows[ids == k].mean(0) for k in range(4)])
        assert torch.allclose(centres, means, atol=1e-3)
        assert torch.equal(count.long(), torch.bincount(ids, minlength=4))
    assert best < 0.1


def test_kmeans_leaves_no_centre_empty():
    rows = torch.cat([torch.zeros(90, 2), torch.randn(30, 2) + 5])  # most starts coincide
    centres, _ = kmeans(rows, 8, iterations=30)
    ids = torch.cdist(rows, centres).argmin(1)
    assert len(ids.unique()) >= 6


def test_the_pool_keeps_the_latest_rows():
    average, rows = CodebookAverage(torch.randn(4, 2), pool=8), torch.randn(30, 2)
    for batch in rows[:27].split(3):
        average.collect(batch)
    assert torch.equal(average.pool, rows[19:27])
    average.collect(rows)  # a batch larger than the pool
    assert torch.equal(average.pool, rows[22:])


def test_kmeans_start_agrees_with_the_averages():
    """Published code forgets its k-means start at the next step, its averages being others."""
    rows = torch.randn(400, 3)
    centres, count = kmeans(rows, 8)
    codebook = torch.randn(8, 3)
    average = CodebookAverage(codebook, decay=0.99)
    average.start(codebook, centres, count / 4)
    assert torch.equal(codebook, centres)
    assert torch.allclose(average.total / average.count[:, None], centres, atol=1e-6)
    assert torch.allclose(average.count, (count / 4).clamp_min(average.threshold))
    batch = rows[:100]
    average.update(codebook, batch, torch.cdist(batch, codebook).argmin(1))
    assert torch.allclose(codebook, centres, atol=0.05)


def test_restart_moves_dead_codes_and_their_averages():
    codebook = torch.randn(5, 2)
    average = CodebookAverage(codebook, decay=0.5, threshold=0.1)
    alive = torch.tensor([0, 2, 4])
    for _ in range(6):  # codes 1 and 3 fall to 1/64 row a step
        average.update(codebook, torch.randn(30, 2), alive.repeat(10))
    before, rows = codebook.clone(), torch.randn(9, 2) + 100
    assert average.restart(codebook, rows).item() == 2
    assert torch.equal(codebook[alive], before[alive])
    moved = codebook[[1, 3]].clone()
    assert (torch.cdist(moved, rows).min(1).values == 0).all()
    assert torch.allclose(average.total / average.count[:, None], codebook)
    assert average.restart(codebook, rows).item() == 0
    average.update(codebook, torch.randn(30, 2), alive.repeat(10))
    assert torch.allclose(codebook[[1, 3]], moved)  # and not drawn back to where they were
    assert average.restart(codebook, rows).item() == 0


def unchunked_entropy(rows, codes, temperature):
    p = torch.softmax(-torch.cdist(rows, codes).square() / temperature, dim=1)
    each = -(p * p.log()).sum(1).mean()
    mean = p.mean(0)
    return each + (mean * mean.log()).sum()


@pytest.mark.parametrize("chunk", [1, 7, 40, 4096])
def test_entropy_equals_the_unchunked_formula(chunk):
    rows = torch.randn(40, 3, dtype=torch.double, requires_grad=True)
    codes = torch.randn(11, 3, dtype=torch.double, requires_grad=True)
    expected = unchunked_entropy(rows, codes, 0.7)
    loss = entropy_loss(rows, codes, 0.7, chunk=chunk)
    assert torch.allclose(loss, expected)
    ours = torch.autograd.grad(loss, (rows, codes))
    for own, right in zip(ours, torch.autograd.grad(expected, (rows, codes)), strict=True):
        assert torch.allclose(own, right, atol=1e-12)


def test_entropy_of_parts_has_the_gradient_of_the_whole():
    rows = torch.randn(40, 3, dtype=torch.double, requires_grad=True)
    codes = torch.randn(11, 3, dtype=torch.double, requires_grad=True)
    mean = sum(mean_distribution(part, codes, 0.7) for part in rows.split(10)) / 4
    parts = torch.stack([entropy_loss(part, codes, 0.7, mean) for part in rows.split(10)]).mean()
    whole = entropy_loss(rows, codes, 0.7)
    assert torch.allclose(parts, whole)
    for own, right in zip(
        torch.autograd.grad(parts, (rows, codes)),
        torch.autograd.grad(whole, (rows, codes)),
        strict=True,
    ):
        assert torch.allclose(own, right, atol=1e-12)


def test_entropy_and_kmeans_are_float32_whatever_surrounds_them():
    rows, codes = torch.randn(400, 8) * 4, torch.randn(11, 8) * 4
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append((entropy_loss(rows, codes, 0.1), *kmeans(rows, 11)))
    assert all(torch.equal(plain, within) for plain, within in zip(*results, strict=True))


def test_entropy_at_its_ends():
    codes = torch.eye(4) * 100
    assert entropy_loss(codes, codes, 1.0).item() == pytest.approx(-torch.tensor(4.0).log().item())
    assert entropy_loss(codes[:1].repeat(9, 1), codes, 1.0).item() == pytest.approx(0, abs=1e-5)
    assert entropy_loss(torch.zeros(9, 4), codes, 1.0).item() == pytest.approx(0, abs=1e-5)


def test_entropy_keeps_no_matrix_of_tokens_and_codes():
    rows, codes = torch.randn(512, 2, requires_grad=True), torch.randn(256, 2, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        entropy_loss(rows, codes, 1.0, chunk=64)
    assert sum(kept) < 512 * 256 / 4


def test_usage_and_perplexity():
    assert usage(torch.tensor([[0, 1], [1, 0]]), 8) == pytest.approx((2 / 8, 2))
    assert usage(torch.tensor([[[0, 0, 1, 2]]]), 3) == pytest.approx((1, 2**1.5))
    assert usage(torch.arange(1000), 1000) == pytest.approx((1, 1000))
    assert usage(torch.zeros(7, dtype=torch.int64), 10) == pytest.approx((0.1, 1))


def learn_together(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    codebook, rows = torch.randn(6, 3), torch.randn(80, 3)
    ids = torch.randint(5, (80,))
    own = slice(40 * rank, 40 * rank + 40)  # each process has half of the batch
    torch.manual_seed(rank)
    average = CodebookAverage(codebook, decay=0.05)
    average.update(codebook, rows[own], ids[own])
    result = {"codebook": codebook.clone(), "count": average.count.clone()}
    average.restart(codebook, rows[own])
    result |= {"restarted": codebook.clone(), "total": average.total}
    result["centres"], result["hits"] = kmeans(rows, 6)
    few = rows[:4]
    result["exact"], _ = kmeans(few, 4, iterations=1)  # each begins with another order of the four
    result["spread"], _ = kmeans(few.repeat(10, 1), 20)  # centres fall on one another and move
    average = CodebookAverage(codebook, pool=16)
    average.collect(rows[own][:5])
    average.collect(rows[own][5:10])
    result["pool"] = average.pool
    one = torch.ones(1)
    result["weight"] = adaptive_weight((1 + rank) * one, one, maximum=10.0)
    result["entropy"] = entropy_loss(rows[own], codebook, 0.7)
    dist.all_reduce(result["entropy"])
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_agree_with_each_other_and_with_one(tmp_path):
    pair(learn_together, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in first:
        assert torch.allclose(first[name], second[name]), name

    torch.manual_seed(0)
    codebook, rows = torch.randn(6, 3), torch.randn(80, 3)
    ids = torch.randint(5, (80,))
    average = CodebookAverage(codebook, decay=0.05)
    average.update(codebook, rows, ids)
    assert torch.allclose(first["codebook"], codebook, atol=1e-6)
    assert torch.allclose(first["count"], average.count, atol=1e-6)
    assert (first["restarted"][5] == rows).all(1).any()  # the dead one
    assert first["hits"].sum() == 80
    assert torch.equal(first["exact"].sort(0).values, rows[:4].sort(0).values)
    both = torch.cat([rows[:5], rows[40:45], rows[5:10], rows[45:50]])
    assert torch.equal(first["pool"], both[-16:])
    assert first["weight"].item() == pytest.approx(1.5, rel=1e-5)
    whole = entropy_loss(rows, first["restarted"], 0.7).item()
    assert first["entropy"].item() / 2 == pytest.approx(whole, rel=1e-5)
