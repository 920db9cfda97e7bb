"""CDNE: the loss against a double loop over images, and the memory against its update rule applied row by row."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_parts import Recorder, make_run, with_draws, write_data

from orbithash.encoders.errors import InputError
from orbithash.trainers.config import load_config
from orbithash.trainers.data.loading import Part
from orbithash.trainers.loop.loop import train
from orbithash.trainers.methods import Batch, get_method
from orbithash.trainers.methods.cdne import Cdne, CdneConfig, Embedded, neighbour_log_sums, snca_loss
from orbithash.trainers.methods.memory import Memory

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


# The loss.


def unit(row):
    length = max(math.sqrt(sum(x * x for x in row)), 1e-6)
    return [x / length for x in row]


def oracle(anchors, labels, rows, keys, key_labels, key_rows, temperature, margin):
    """Return the loss by its formula; the largest exponent is subtracted from all to avoid overflow."""
    total = 0.0
    for e, y, i in zip(anchors, labels, rows, strict=True):
        same, others = [], []
        for m, z, j in zip(keys, key_labels, key_rows, strict=True):
            if i != j:
                cosine = sum(a * b for a, b in zip(e, m, strict=True))
                (same if y == z else others).append((cosine - margin * (y == z)) / temperature)
        if same:
            largest = max(same + others)
            numerator = sum(math.exp(x - largest) for x in same)
            total -= math.log(numerator / (numerator + sum(math.exp(x - largest) for x in others)))
    return total / max(1, len(anchors))


def inputs(num, num_keys, num_classes=3, bits=8, seed=0, dtype=torch.float32):
    """Return random keys, and anchors that are some of the keys with noise."""
    generator = torch.Generator().manual_seed(seed)
    keys = F.normalize(torch.randn(num_keys, bits, generator=generator), dim=1)
    rows = torch.randperm(num_keys, generator=generator)[:num]
    anchors = F.normalize(keys[rows] + 0.3 * torch.randn(num, bits, generator=generator), dim=1)
    key_labels = torch.randint(num_classes, (num_keys,), generator=generator)
    return anchors.to(dtype), key_labels[rows], rows, keys.to(dtype), key_labels, torch.arange(num_keys)


def value(given, temperature=0.05, margin=0.0):
    return snca_loss(neighbour_log_sums(Embedded(*given[:3]), Embedded(*given[3:]), temperature, margin))


def expected(given, temperature=0.05, margin=0.0):
    return oracle(*((x.double() if x.is_floating_point() else x).tolist() for x in given), temperature, margin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num", "num_keys", "num_classes"), [(1, 2, 1), (1, 5, 2), (6, 6, 3), (7, 40, 5)])
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_loss_matches_a_double_loop(dtype, num, num_keys, num_classes, margin):
    for seed in range(3):
        given = inputs(num, num_keys, num_classes, seed=seed, dtype=dtype)
        found = value(given, margin=margin)
        assert found.shape == ()
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        assert float(found) == pytest.approx(expected(given, margin=margin), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.005, 0.02, 0.2, 1.0])
def test_loss_matches_a_double_loop_at_every_temperature(temperature):
    given = inputs(9, 30)
    # The loss is a difference of sums near 200 in single precision.
    assert float(value(given, temperature)) == pytest.approx(expected(given, temperature), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("variant", ["memory", "in-batch"])
def test_opposite_neighbours_at_a_low_temperature_stay_finite(variant):
    anchors = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    labels, rows = torch.tensor([0, 0, 1]), torch.arange(3)
    keys = anchors if variant == "in-batch" else anchors.detach().clone()
    found = value((anchors, labels, rows, keys, labels, rows), temperature=0.005)
    found.backward()
    # Anchor 0: own class at cosine -1, the other class at 1. Anchor 1: both at -1. Anchor 2: alone in its class.
    assert float(found.detach()) == pytest.approx((400 + math.log(2)) / 3, rel=1e-5)
    assert anchors.grad.isfinite().all()


def test_an_anchor_alone_in_its_class_adds_no_loss():
    anchors, labels, rows, keys, key_labels, key_rows = inputs(4, 4)
    labels = torch.tensor([0, 0, 1, 2])
    key_labels = torch.empty(4, dtype=torch.int64)
    key_labels[rows] = labels
    given = (anchors.requires_grad_(), labels, rows, keys, key_labels, key_rows)
    found = value(given)
    found.backward()
    assert float(found.detach()) == pytest.approx(expected([x.detach() for x in given]), rel=1e-4)
    assert (anchors.grad.abs().sum(1) > 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_without_pairs_or_anchors_is_zero_and_has_gradients(dtype):
    anchors = F.normalize(torch.randn(3, 4), dim=1).to(dtype).requires_grad_()
    labels, rows = torch.arange(3), torch.arange(3)
    for num in (3, 1, 0):
        few = anchors[:num], labels[:num], rows[:num]
        for keys in ((anchors.detach(), labels, rows), few):
            anchors.grad = None
            found = value((*few, *keys))
            found.backward()
            assert float(found.detach()) == 0
            assert not anchors.grad.any()


def test_the_gradient_attracts_the_own_class_and_repels_the_others():
    anchors = torch.tensor([[1.0, 0.0]], requires_grad=True)
    keys = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0]])
    own = torch.tensor([2])
    value((anchors, torch.tensor([0]), own, keys, torch.tensor([0, 1, 0]), torch.arange(3)), 0.5).backward()
    # Both other rows have cosine 0, hence probability 1/2. The anchor's own row (cosine 1) is excluded.
    assert anchors.grad[0].tolist() == pytest.approx([0.0, -2.0])


def test_log_sums_over_parts_of_the_keys_add_up():
    given = inputs(6, 20, dtype=torch.float64)
    anchors, keys = Embedded(*given[:3]), Embedded(*given[3:])
    whole = neighbour_log_sums(anchors, keys, 0.05, 0.1)
    parts = [neighbour_log_sums(anchors, Embedded(*(x[r::3] for x in keys)), 0.05, 0.1) for r in range(3)]
    assert torch.allclose(torch.logsumexp(torch.stack(parts), dim=0), whole, rtol=1e-12)


# The memory.


def test_a_write_follows_the_update_rule_and_leaves_other_rows_unchanged():
    for sharded in (False, True):
        memory = Memory(5, 3, sharded)
        start = F.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), dim=1)
        memory.whole.copy_(start)
        memory.open()
        assert memory.state_dict()["whole"].shape == (0 if sharded else 5, 3)
        new = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        rows = torch.tensor([3, 0])
        memory.write(rows, new, keep=0.8, own=memory.own(rows) if sharded else None)
        memory.close()
        for row, given in ((3, new[0]), (0, new[1])):
            mixed = [0.8 * m + 0.2 * e for m, e in zip(start[row].tolist(), given.tolist(), strict=True)]
            assert memory.whole[row].tolist() == pytest.approx(unit(mixed))
        assert torch.equal(memory.whole[[1, 2, 4]], start[[1, 2, 4]])


def test_opposite_vectors_cancel_to_zeros_without_nan():
    memory = Memory(1, 2, False)
    memory.whole.copy_(torch.tensor([[1.0, 0.0]]))
    memory.open()
    memory.write(torch.tensor([0]), torch.tensor([[-1.0, 0.0]]), keep=0.5)
    assert memory.whole.tolist() == [[0, 0]]


# The method.

SIDE = 32


def make(num_classes=3, num_rows=8, **settings):
    torch.manual_seed(0)
    given = {"backbone": "mobilenet_v3_small", "image_size": SIDE, "bits": 16, "batch_size": 4, "epochs": 2, **settings}
    return Cdne(load_config(CdneConfig, **given), num_classes, num_rows)


def make_part(num_rows=8):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_rows, 38, 38, 3)).astype(np.uint8)
    return Part(images, np.arange(num_rows) % 3, [str(i) for i in range(num_rows)])


def make_batch(rows=(1, 4, 2, 5)):
    rows = torch.tensor(rows)
    images = torch.randn(len(rows), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(int(rows[0])))
    return Batch(rows, rows % 3, images, {}, 7)


def started(**settings):
    method = make(**settings)
    method.begin(make_part())
    method.start_epoch(0, make_part())
    return method.train()


def test_the_loss_is_the_weighted_sum_of_its_parts():
    method = started(snca_weight=0.3, classification_weight=2, quantisation_weight=5, temperature=0.1, margin=0.05)
    batch = make_batch()
    with torch.no_grad():
        found = method(batch)
        hashes, logits = method.network(batch.images)
    anchors = [unit(row) for row in hashes.double().tolist()]
    labels, rows = batch.labels.tolist(), batch.rows.tolist()
    keys, key_labels = method.memory.whole.double().tolist(), [i % 3 for i in range(8)]
    snca = oracle(anchors, labels, rows, keys, key_labels, list(range(8)), 0.1, 0.05)
    cross_entropy = 0.0
    for row, label in zip(logits.double().tolist(), labels, strict=True):
        cross_entropy += (math.log(sum(math.exp(x) for x in row)) - row[label]) / 4
    distance = sum((abs(f) - 1) ** 2 for row in hashes.double().tolist() for f in row) / (4 * 16)
    assert float(found["snca"]) == pytest.approx(snca, rel=1e-4)
    assert float(found["classification"]) == pytest.approx(cross_entropy, rel=1e-4)
    assert float(found["quantisation"]) == pytest.approx(distance, rel=1e-4)
    assert float(found["loss"]) == pytest.approx(0.3 * snca + 2 * cross_entropy + 5 * distance, rel=1e-4)


def test_in_batch_neighbours_are_the_batch_and_receive_gradients():
    method = started(variant="in-batch", temperature=0.2)
    batch = make_batch((0, 3, 6, 1))
    assert not [name for name in method.state_dict() if not name.startswith("network.")]
    hashes = torch.randn(4, 16, requires_grad=True)
    embeddings = F.normalize(hashes, dim=1)
    loss = method._snca(embeddings, batch)
    rows = [unit(row) for row in hashes.tolist()]
    whom = batch.labels.tolist(), batch.rows.tolist()
    assert float(loss.detach()) == pytest.approx(oracle(rows, *whom, rows, *whom, 0.2, 0), rel=1e-4)
    loss.backward()
    # Row 3 is alone in its class, so it receives gradients only as a neighbour of others.
    assert hashes.grad[3].abs().sum() > 0
    method.after_step(batch)
    method.end_epoch()


@pytest.mark.parametrize("variant", ["memory-bank", "momentum"])
def test_sharded_memory_in_one_process_equals_the_replicated_one(variant):
    found = []
    for sharded in (False, True):
        method = started(variant=variant, sharded_memory=sharded, margin=0.1).double()
        method.memory.share = method.memory.share.double() if sharded else method.memory.whole
        batch = make_batch()
        batch = with_draws(method, batch._replace(images=batch.images.double()))
        losses = method(batch)
        losses["loss"].backward()
        method.after_step(batch)
        method.end_epoch()
        found.append((losses["snca"], method.network.head.output.weight.grad, method.memory.whole))
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", ["memory-bank", "momentum"])
def test_memory_is_written_only_after_the_step(variant):
    method = started(variant=variant)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    for rows in ((1, 4, 2, 5), (0, 3, 6, 7)):
        method(make_batch(rows))["loss"].backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    method.after_step(make_batch((0, 3, 6, 7)))
    changed = (method.memory.whole != before["memory.whole"]).any(dim=1)
    assert changed.nonzero()[:, 0].tolist() == [0, 3, 6, 7]


def test_the_memory_starts_with_the_embeddings_of_the_images():
    method, part = make(), make_part()
    method.begin(part)
    preprocessing = method.config.preprocessing()
    mean, std = (np.array(v) for v in (preprocessing.mean, preprocessing.std))
    for row, image in enumerate(part.images):
        inputs = ((preprocessing.prepare(image) / 255 - mean) / std).transpose(2, 0, 1)
        with torch.no_grad():
            hashes = method.eval().network(torch.from_numpy(inputs[None]).float()).hashes[0]
        assert method.memory.whole[row].tolist() == pytest.approx(unit(hashes.tolist()), abs=5e-4)


def test_a_random_start_is_uniform_with_unit_length_on_average():
    method = make(num_rows=4000, memory_start="random")
    before = method.memory.whole.clone()
    method.begin(make_part())
    assert torch.equal(method.memory.whole, before)
    assert float(before.abs().max()) <= math.sqrt(3 / 16)
    assert float(before.square().sum(1).mean()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("variant", ["memory-bank", "momentum"])
def test_the_memory_after_an_epoch_follows_the_update_rule(variant, tmp_path):
    """The expected memory is computed here from the networks before each step."""
    seen, methods = [], []

    class Watched(Cdne):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            methods[:] = [self]

        def start_epoch(self, epoch, training):
            self.first = self.memory.whole.clone()
            return super().start_epoch(epoch, training)

        def forward(self, batch):
            network = self.network if self.average is None else self.average
            weights = {name: p.detach().clone() for name, p in self.network.named_parameters()}
            before = {} if self.average is None else {n: p.clone() for n, p in self.average.named_parameters()}
            with torch.no_grad():
                hashes = network(batch.images).hashes
            seen.append((batch.rows.tolist(), hashes.tolist(), weights, before))
            return super().forward(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orbithash.trainers.loop.run.get_method", lambda name: Watched)
        settings = {"epochs": 1, "warm_up_epochs": 0, "encoder_momentum": 0.9 if variant == "momentum" else None}
        train(make_run(write_data(tmp_path / "data"), "cdne", variant=variant, **settings), Recorder())
    (method,) = methods
    assert len(seen) > 2
    rows = method.first.tolist()
    for written, hashes, _, _ in seen:
        for row, new in zip(written, hashes, strict=True):
            e = unit(new)
            mixed = [0.5 * a + 0.5 * b for a, b in zip(rows[row], e, strict=True)]
            rows[row] = e if variant == "momentum" else unit(mixed)
    assert method.memory.whole.shape == method.first.shape
    for found, row in zip(method.memory.whole.tolist(), rows, strict=True):
        assert found == pytest.approx(row, abs=1e-5)
    # The moving average mixes its old weights with the network's weights after the step.
    for (*_, before), (_, _, weights, after) in itertools.pairwise(seen):
        for name in before:
            assert torch.allclose(after[name], 0.9 * before[name] + 0.1 * weights[name], atol=1e-6), name


def test_mu_changes_at_the_same_fractions_of_the_run_as_in_the_released_code():
    def mus(**settings):
        method = make(**settings)
        found = []
        for epoch in range(method.config.epochs):
            method.start_epoch(epoch, make_part())
            found.append(method._mu)
            method.end_epoch()
        return found

    assert mus(epochs=130) == [0.5] * 80 + [0.8] * 40 + [0.9] * 10
    assert mus(epochs=13) == [0.5] * 8 + [0.8] * 4 + [0.9]
    assert mus(epochs=1) == [0.5]
    assert mus(epochs=3, memory_momentum=0.0) == [0.0] * 3


@pytest.mark.parametrize(
    ("epochs", "num_rows", "given", "momentum"),
    [(130, 22_050, None, 0.999), (15, 1520, None, 1 - 10 / 705), (1, 32, None, 0.0), (15, 1520, 0.99, 0.99)],
)
def test_short_runs_average_over_fewer_steps(epochs, num_rows, given, momentum):
    batch_size = 256 if num_rows > 20_000 else 32
    method = make(num_rows=num_rows, variant="momentum", epochs=epochs, batch_size=batch_size, encoder_momentum=given)
    assert method.encoder_momentum == pytest.approx(momentum)


def test_the_average_starts_equal_to_the_network_and_is_not_trained():
    method = make(variant="momentum")
    network, average = method.network.state_dict(), method.average.state_dict()
    assert average
    assert all(torch.equal(tensor, network[name]) for name, tensor in average.items())
    grouped = {id(p) for group in method.build_optimizer().param_groups for p in group["params"]}
    assert grouped == {id(p) for p in method.network.parameters()}
    method.start_epoch(1, make_part())
    assert not any(p.requires_grad for p in method.average.parameters())


def test_hashes_have_no_activation():
    method = make()
    assert method.network.spec.head.activation == "none"
    assert method.network.spec.head.threshold == 0


def test_hashes_of_zero_have_a_finite_gradient():
    method = started()
    torch.nn.init.zeros_(method.network.head.output.weight)
    losses = method(make_batch())
    losses["loss"].backward()
    assert losses["loss"].isfinite()
    assert all(p.grad.isfinite().all() for p in method.network.head.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_learning_rates_and_schedules(optimizer):
    method = make(optimizer=optimizer, lr=0.001, head_lr_factor=10, epochs=4, warm_up_epochs=1)
    rates = {id(p): group["lr"] for group in method.build_optimizer().param_groups for p in group["params"]}
    assert rates[id(method.network.classifier.weight)] == pytest.approx(0.01)
    assert all(rates[id(p)] == 0.001 for p in method.network.backbone.parameters())
    factors = [method.start_epoch(epoch, make_part()) for epoch in range(4)]
    assert factors == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    method = make(schedule="step", lr_decay=0.4, lr_decay_epochs=2)
    assert [method.start_epoch(epoch, make_part()) for epoch in range(5)] == pytest.approx([1, 1, 0.4, 0.4, 0.16])


def test_the_warm_up_freezes_only_the_backbone():
    method = make(warm_up_epochs=1)
    for epoch, trains in ((0, False), (1, True)):
        method.start_epoch(epoch, make_part())
        assert {p.requires_grad for p in method.network.backbone.parameters()} == {trains}
        assert all(p.requires_grad for p in method.network.head.parameters())


def test_conflicting_settings_are_refused():
    with pytest.raises(InputError, match="images_per_class is 4 with variant=memory-bank"):
        make(images_per_class=4)
    with pytest.raises(InputError, match="memory-bank"):
        make(variant="bank")
    assert get_method("cdne") is Cdne
