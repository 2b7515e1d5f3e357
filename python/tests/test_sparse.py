"""Sparse tables from Python, and embeddings that train on servers as PyTorch's own do in one process."""

from __future__ import annotations

import numpy
import pytest
import torch
from test_ps import on_workers
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import gradwire
from gradwire.torch import EmbeddingBag, EmbeddingCollection, EmbeddingConfig

USERS, COHORTS, ITEMS, DIM = 40, 4, 30, 6
STEPS, BATCH = 150, 64


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_rows_come_back_in_the_shape_of_their_ids(dtype):
    with gradwire.LocalCluster(servers=3) as cluster, cluster.connect() as client:
        table = client.sparse("rows", 5, dtype, initializer=0.5)
        ids = numpy.array([[7, -1, 7], [0, 2**62, 3]])
        gradients = numpy.arange(30, dtype=dtype).reshape(2, 3, 5)
        table.push(ids, gradients)
        out = numpy.empty((2, 3, 5), dtype)
        assert table.pull_async(ids, out).wait(60) is out
        expected = gradients + 0.5
        expected[0, 0] = expected[0, 2] = gradients[0, 0] + gradients[0, 2] + 0.5
        numpy.testing.assert_array_equal(out, expected)
        numpy.testing.assert_array_equal(table.pull([9, 7])[0], numpy.full(5, 0.5, dtype))
        assert table.pull(numpy.empty((0,), numpy.int64)).shape == (0, 5)
        status = client.status()
        assert sum(shard["sparse"][0]["rows"] for shard in status) == 5


def test_first_values_are_the_same_for_everybody_and_lie_as_they_should():
    first = []
    for servers in (1, 3):
        with gradwire.LocalCluster(servers=servers) as cluster, cluster.connect() as client:
            uniform = client.sparse("u", 8, initializer=gradwire.Uniform(-0.5, 0.5), seed=3).pull(range(2000))
            normal = client.sparse("n", 8, initializer=gradwire.Normal(1.0, 0.1)).pull(range(2000))
            other = client.sparse("o", 8, initializer=gradwire.Uniform(-0.5, 0.5), seed=3).pull(range(2000))
            first.append((uniform, normal))
            assert (uniform != other).any() and abs(uniform).max() <= 0.5 and abs(uniform.mean()) < 0.02
            assert abs(normal.mean() - 1) < 0.01 and abs(normal.std() - 0.1) < 0.01
    numpy.testing.assert_array_equal(first[0], first[1])


def test_evicted_ids_are_told_once():
    with gradwire.LocalCluster() as cluster, cluster.connect() as client:
        table = client.sparse("few", 2, capacity=10, eviction=gradwire.LFU())
        for ids in (range(10), range(5), range(20, 25)):
            table.push(ids, numpy.ones((len(ids), 2), numpy.float32))
        ids, lost = table.evicted()
        assert ids.tolist() == [5, 6, 7, 8, 9] and lost == 0
        assert table.evicted()[0].size == 0


def test_bad_sparse_input_is_refused_by_name_and_the_server_goes_on():
    with gradwire.LocalCluster() as cluster, cluster.connect() as client:
        table = client.sparse("t", 4, capacity=3)
        ones = numpy.ones((2, 4), numpy.float32)
        with pytest.raises(ValueError, match=r"gradients has shape \(2, 4\).*must have \(3, 4\)"):
            table.push([1, 2, 3], ones)
        with pytest.raises(ValueError, match="ids have dtype int32"):
            table.push(numpy.arange(2, dtype=numpy.int32), ones)
        with pytest.raises(ValueError, match="out has dtype float64"):
            table.pull([1, 2], numpy.empty((2, 4)))
        with pytest.raises(gradwire.ServerRefusedError, match="raise the capacity"):
            table.push([1, 2, 3, 4], numpy.ones((4, 4), numpy.float32))
        for options, why in [
            ({"eviction": gradwire.LRU()}, "capacity"),
            ({"eviction": "lru"}, "LFU"),
            ({"initializer": "ones"}, "Uniform"),
            ({"optimizer": gradwire.SGD(momentum=0.9)}, "momentum"),
            ({"staleness": 2}, "workers"),
            ({"initializer": gradwire.Normal(0.0, -1.0)}, "normal"),
            ({"compression": gradwire.TopK(0.1)}, "ids have picked the rows already"),
            ({"compression": "int4"}, "fp16"),
            ({"max_grad_norm": -1}, "largest norm"),
        ]:
            with pytest.raises(ValueError, match=why):
                client.sparse("bad", 4, **options)
        with cluster.connect() as other, pytest.raises(gradwire.ServerRefusedError, match="elements of a row"):
            other.sparse("t", 5, capacity=3)
        table.push([1, 2], ones)
        numpy.testing.assert_array_equal(table.pull([2, 1]), ones)


def test_a_push_is_clipped_by_the_norm_of_its_rows_as_pytorch_does():
    with gradwire.LocalCluster(servers=3) as cluster, cluster.connect() as client:
        bag = EmbeddingBag(None, 4, client, name="clipped", mode="sum", initializer=gradwire.Uniform(), max_grad_norm=0.5)
        before = torch.from_numpy(bag.table.pull(range(50)))
        theirs = nn.EmbeddingBag.from_pretrained(before.clone(), freeze=False, mode="sum")
        ids = torch.randint(0, 50, (20, 3), generator=torch.Generator().manual_seed(1))
        for of in (bag, theirs):
            of(ids).pow(2).sum().backward()
        bag.synchronize()
        assert nn.utils.clip_grad_norm_(theirs.parameters(), 0.5) > 0.5
        gained = torch.from_numpy(bag.table.pull(range(50))) - before
        torch.testing.assert_close(gained, theirs.weight.grad, rtol=1e-4, atol=1e-6)
        assert {table["max_grad_norm"] for shard in client.status() for table in shard["sparse"]} == {0.5}


def test_no_worker_gets_further_ahead_than_staleness_allows():
    def work(client, rank):
        table = client.sparse("race", 1, workers=2, staleness=1)
        dense = client.dense("race too", 2, workers=2, staleness=1)
        for clock in range(1, 21):
            table.push([rank], numpy.ones((1, 1), numpy.float32))
            dense.push(numpy.eye(2, dtype=numpy.float32)[rank])
            for seen in (table.pull([0, 1])[:, 0], dense.pull()):
                assert seen[rank] == clock and clock - 1 <= seen[1 - rank] <= clock + 2
        return True

    with gradwire.LocalCluster(servers=2) as cluster:
        assert on_workers(cluster, 2, work) == [True, True]


def ratings():
    """A rank-DIM matrix of ratings by users, who come in cohorts, of items; and the batches to learn it from."""
    generator = torch.Generator().manual_seed(5)
    users, cohorts, items = (
        torch.randn(rows, DIM, generator=generator, dtype=torch.float64) * 0.6 for rows in (USERS, COHORTS, ITEMS)
    )
    truth = (users + cohorts[torch.arange(USERS) % COHORTS]) @ items.T
    picks = torch.randint(0, USERS * ITEMS, (STEPS, BATCH), generator=generator)
    return truth, picks // ITEMS, picks % ITEMS


def bags(users):
    """A bag of two ids for each user: itself and its cohort, beyond the users."""
    return torch.stack([users, USERS + users % COHORTS], 1)


def rmse(truth, users, items):
    everybody, everything = torch.arange(USERS), torch.arange(ITEMS)
    with torch.no_grad():
        return ((users(bags(everybody)) @ items(everything[:, None]).T - truth) ** 2).mean().sqrt().item()


OPTIMIZERS = {
    "sgd": (gradwire.SGD(2.0), lambda p: torch.optim.SGD(p, 2.0)),
    "adagrad": (gradwire.Adagrad(0.3), lambda p: torch.optim.Adagrad(p, 0.3)),
    "adam": (gradwire.Adam(0.03), lambda p: torch.optim.SparseAdam(p, 0.03)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_workers_and_two_servers_train_as_pytorch_does_alone(name):
    truth, users, items = ratings()
    on_server, alone = OPTIMIZERS[name]

    def work(client, rank):
        options = {"optimizer": on_server, "workers": 2, "average": True, "mode": "sum", "dtype": "float64"}
        first = gradwire.Normal(0.0, 0.3)
        of_users = EmbeddingBag(None, DIM, client, name="users", initializer=first, **options)
        of_items = EmbeddingBag(ITEMS, DIM, client, name="items", initializer=first, **options)
        begun = [torch.from_numpy(of.table.pull(range(n))) for of, n in ((of_users, USERS + COHORTS), (of_items, ITEMS))]
        mine = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
        for user, item in zip(users[:, mine], items[:, mine]):
            loss = ((of_users(bags(user)) * of_items(item[:, None])).sum(1) - truth[user, item]).square().mean()
            loss.backward()
        of_users.synchronize()
        of_items.synchronize()
        ended = [torch.from_numpy(of.table.pull(range(n))) for of, n in ((of_users, USERS + COHORTS), (of_items, ITEMS))]
        return begun, ended, rmse(truth, of_users, of_items)

    with gradwire.LocalCluster(servers=2) as cluster:
        (begun, ended, error), (_, same, _) = on_workers(cluster, 2, work)
    assert all(torch.equal(one, other) for one, other in zip(ended, same))
    bag_users, bag_items = (nn.EmbeddingBag.from_pretrained(b.clone(), freeze=False, mode="sum", sparse=True) for b in begun)
    optimizer = alone([bag_users.weight, bag_items.weight])
    for user, item in zip(users, items):
        optimizer.zero_grad()
        loss = ((bag_users(bags(user)) * bag_items(item[:, None])).sum(1) - truth[user, item]).square().mean()
        loss.backward()
        optimizer.step()
    for got, module, start in zip(ended, (bag_users, bag_items), begun):
        assert (module.weight - start).abs().max() > 0.1, "it has learnt"
        torch.testing.assert_close(got, module.weight.detach(), rtol=1e-8, atol=1e-9)
    assert error == pytest.approx(rmse(truth, bag_users, bag_items))
    assert error < truth.std() / 2, "it has learnt what is to be learnt"


def learn(compression=None):
    """Learns the ratings alone with compressed rows: the error at the end, and the bytes pushed and pulled."""
    truth, users, items = ratings()
    options = {"optimizer": gradwire.Adagrad(0.3), "mode": "sum", "workers": 1, "compression": compression}
    first = gradwire.Normal(0.0, 0.3)
    with gradwire.LocalCluster(servers=2) as cluster, cluster.connect(rank=0) as client:
        of_users = EmbeddingBag(None, DIM, client, name="users", initializer=first, **options)
        of_items = EmbeddingBag(None, DIM, client, name="items", initializer=first, **options)
        for user, item in zip(users, items):
            loss = ((of_users(bags(user)) * of_items(item[:, None])).sum(1) - truth[user, item]).square().mean()
            loss.backward()
        of_users.synchronize()
        of_items.synchronize()
        tables = [table for shard in client.status() for table in shard["sparse"]]
        described = f"push {compression or 'none'}, pull {compression or 'none'}"
        assert {table["compression"] for table in tables} == {described}
        counted = [sum(table[key] for table in tables) for key in ("pushed_bytes", "pulled_bytes")]
        return rmse(truth, of_users, of_items), counted


def test_compressed_rows_learn_as_well_within_three_percent_of_the_spread_and_travel_as_fewer_bytes():
    error, (pushed, pulled) = learn()
    spread = ratings()[0].std().item()
    assert error < spread / 2, "it has learnt what is to be learnt"
    # A row of 6 floats has 24 bytes, with its id 32; with two bytes an element 12 and 20, with one and a scale 10 and 18.
    for compression, row in (("bf16", 12), ("fp16", 12), ("int8", 10)):
        another, (less_pushed, less_pulled) = learn(compression)
        assert abs(another - error) < 0.03 * spread, (compression, another, error)
        assert another != error, "something was lost, so something was compressed"
        assert less_pulled == pulled * row / 24
        assert less_pushed / pushed == pytest.approx((8 + row) / 32, abs=0.01)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_pools_and_weighs_as_pytorch_s(mode):
    with gradwire.LocalCluster(servers=2) as cluster, cluster.connect() as client:
        bag = EmbeddingBag(None, 3, client, name="pool", mode=mode, initializer=gradwire.Uniform())
        ids, offsets = torch.tensor([5, 9, 5, 7, 5]), torch.tensor([0, 2, 2])
        rows = torch.from_numpy(bag.table.pull(range(10)))
        theirs = nn.EmbeddingBag.from_pretrained(rows.clone(), freeze=False, mode=mode)
        torch.testing.assert_close(bag(ids, offsets), theirs(ids, offsets))
        weights = {"per_sample_weights": torch.arange(5.0)} if mode == "sum" else {}
        with torch.no_grad():
            torch.testing.assert_close(bag(ids, offsets, **weights), theirs(ids, offsets, **weights))
        bag(ids, offsets, **weights).pow(2).sum().backward()
        theirs(ids, offsets, **weights).pow(2).sum().backward()
        bag.synchronize()
        gradient = torch.from_numpy(bag.table.pull(range(10))) - rows
        torch.testing.assert_close(gradient, theirs.weight.grad)
        empty = bag(torch.empty(0, dtype=torch.int64), torch.tensor([0, 0]))
        assert empty.shape == (2, 3) and not empty.any()
        empty.sum().backward()


def test_batches_are_prefetched_in_order_and_no_more_than_permitted():
    with gradwire.LocalCluster() as cluster, cluster.connect() as client:
        bag = EmbeddingBag(None, 2, client, name="p", mode="sum", staleness_permits=2, timeout_s=0.1)
        one, two, three = (torch.tensor([[n, n + 1]]) for n in (1, 2, 3))
        bag.prefetch(one)
        bag.prefetch(two)
        with pytest.raises(TimeoutError, match="2 batches"):
            bag.prefetch(three)
        with pytest.raises(RuntimeError, match="order"):
            bag(two)
        # The permit comes back with the gradient, not before.
        out = bag(one)
        with pytest.raises(TimeoutError, match="2 batches"):
            bag.prefetch(three)
        out.sum().backward()
        bag.prefetch(three)
        bag(two).sum().backward()
        with torch.no_grad():
            bag(three)
        bag.synchronize()
        assert bag.table.pull([1, 2, 3])[:, 0].tolist() == [1, 2, 1]


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device. What it holds can be had by a copy to the CPU only: all else that mixes the two is
    refused, as by a GPU. (`meta` is the one device whose backward needs no driver.)"""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device="meta")
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        moves = func is torch.ops.aten._to_copy.default
        leaves, spec = pytree.tree_flatten((args, kwargs))
        inside = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 0]
        mixed = any(isinstance(leaf, cls) for leaf in inside) and not all(isinstance(leaf, cls) for leaf in inside)
        assert not mixed, f"{func} of tensors on two devices"
        target = kwargs.get("device") or torch.device("meta")
        leaves = [leaf.held if isinstance(leaf, cls) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        out = func(*args, **kwargs)
        if moves and target.type == "cpu":
            return out
        return pytree.tree_map_only(torch.Tensor, cls, out)


class Away(TorchDispatchMode):
    """Has copies to that device be tensors on it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and device is not None and device.type == "meta":
            return Elsewhere(args[0].clone())
        return func(*args, **kwargs)


@pytest.mark.parametrize("prefetched", [False, True])
def test_embeddings_are_on_the_device_of_their_ids_and_their_gradients_come_home(prefetched):
    with gradwire.LocalCluster(servers=2) as cluster, cluster.connect() as client:
        bag = EmbeddingBag(None, 3, client, name="bag", mode="sum", initializer=gradwire.Uniform())
        collection = EmbeddingCollection([EmbeddingConfig("things", 4, ["seen"])], client, initializer=gradwire.Uniform())
        held, offsets = torch.tensor([5, 9, 5, 7, 5]), torch.tensor([0, 2])
        ids = Elsewhere(held)
        firsts = [torch.from_numpy(table.pull(range(10))) for table in (bag.table, collection._tables[0].table)]
        with Away():
            if prefetched:
                bag.prefetch(ids)
                collection.prefetch({"seen": ids})
            pooled, seen = bag(ids, Elsewhere(offsets)), collection({"seen": ids})["seen"]
            assert isinstance(pooled, Elsewhere) and isinstance(seen, Elsewhere)
            torch.testing.assert_close(pooled.held, nn.functional.embedding_bag(held, firsts[0], offsets, mode="sum"))
            torch.testing.assert_close(seen.held, firsts[1][held])
            (pooled.sum() + 2 * seen.sum()).backward()
        bag.synchronize()
        collection.synchronize()
        times = torch.bincount(held, minlength=10)[:, None]
        torch.testing.assert_close(torch.from_numpy(bag.table.pull(range(10))) - firsts[0], times.expand(10, 3).float())
        gained = torch.from_numpy(collection._tables[0].table.pull(range(10))) - firsts[1]
        torch.testing.assert_close(gained, 2.0 * times.expand(10, 4))


class Jagged:
    """As TorchRec's JaggedTensor."""

    def __init__(self, values, lengths):
        self._values, self._lengths = values, lengths

    def values(self):
        return self._values

    def lengths(self):
        return self._lengths


def test_a_collection_looks_features_up_in_their_tables():
    with gradwire.LocalCluster(servers=2) as cluster, cluster.connect() as client:
        tables = [EmbeddingConfig("things", 4, ["seen", "bought"]), EmbeddingConfig("places", 2, ["city"], 10)]
        collection = EmbeddingCollection(tables, client, initializer=gradwire.Uniform())
        rows = torch.from_numpy(collection._tables[0].table.pull(range(10)))
        features = {
            "seen": torch.tensor([[1, 2], [2, 3]]),
            "bought": Jagged(torch.tensor([3, 1, 1]), torch.tensor([1, 0, 2])),
            "city": torch.empty(0, dtype=torch.int64),
        }
        collection.prefetch(features)
        out = collection(features)
        torch.testing.assert_close(out["seen"].detach(), rows[features["seen"]])
        torch.testing.assert_close(out["bought"].values().detach(), rows[[3, 1, 1]])
        assert out["bought"].lengths().tolist() == [1, 0, 2] and out["city"].shape == (0, 2)
        (out["seen"].sum() + 10 * out["bought"].values().sum() + out["city"].sum()).backward()
        collection.synchronize()
        gained = torch.from_numpy(collection._tables[0].table.pull(range(5))) - rows[:5]
        torch.testing.assert_close(gained[:, 0], torch.tensor([0.0, 21.0, 2.0, 11.0, 0.0]))
        with pytest.raises(ValueError, match="seen"):
            EmbeddingCollection([tables[0], EmbeddingConfig("more", 4, ["seen"])], client)
