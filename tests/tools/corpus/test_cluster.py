"""The engine of many machines: what is asked of Ray, and a real cluster that loses a worker."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import BackendError, BltError, BltModel, OptionError
from blt_edge.runtime.errors import BundleError
from blt_edge.runtime.patching import PatchingRule
from blt_edge.tools.bench import cluster as bench
from blt_edge.tools.corpus import cluster
from blt_edge.tools.corpus.cluster import AUTO, LOCAL, cluster_engine
from blt_edge.tools.corpus.engines import local_engine
from blt_edge.tools.corpus.texts import ScoredText, Text
from hypothesis import given
from hypothesis import strategies as st


class RayError(Exception):
    """As Ray wraps what an actor raised."""

    def __init__(self, told: str, cause: BaseException | None = None) -> None:
        super().__init__(told)
        self.cause = cause


class FakeRay:
    """Records how it is started, and runs the scorer here on each block."""

    def __init__(self, machines: list[dict[str, float]], there: bool = False) -> None:
        self.machines, self.there = machines, there
        self.started: list[tuple[str, dict[str, Any]]] = []
        self.ended = 0
        self.asked: dict[str, Any] = {}
        self.blocks: list[int] = []
        self.change = lambda batches: batches
        self.exceptions = SimpleNamespace(RayError=RayError)
        context = SimpleNamespace()
        self.data = SimpleNamespace(
            DataContext=SimpleNamespace(get_current=lambda: context),
            ActorPoolStrategy=lambda **asked: asked,
            from_arrow=lambda tables: self._with(tables),
        )

    def init(self, where: str, **settings: Any) -> None:
        self.started.append((where, settings))
        if where != LOCAL and not self.there:
            raise ConnectionError("Could not find any running Ray instance.")

    def shutdown(self) -> None:
        self.ended += 1

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": one} for one in self.machines] + [{"Alive": False}]

    def _with(self, tables: list[Any]) -> Any:
        self.tables = tables
        return self

    def map_batches(self, kind: type, **asked: Any) -> Any:
        self.asked = asked
        self.scorer = kind(**asked["fn_constructor_kwargs"])
        return self

    def iter_batches(self, **asked: Any) -> Iterator[dict[str, np.ndarray]]:
        def batches() -> Iterator[dict[str, np.ndarray]]:
            for table in reversed(self.tables):
                self.blocks.append(table.num_rows)
                yield self.scorer(
                    {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
                )

        yield from self.change(batches())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeRay:
    pytest.importorskip("pyarrow")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Else `auto` depends on what another program left in /tmp/ray.
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    ray = FakeRay([{"CPU": 3.0}, {"CPU": 2.0, "GPU": 1.0}, {"memory": 5.0}])
    monkeypatch.setattr(cluster, "_imported", lambda: ray)
    return ray


def as_texts(data: list[bytes]) -> list[Text]:
    return [Text(number, "made", None, one, None, 0) for number, one in enumerate(data)]


def test_results_are_the_local_engines(fake: FakeRay, tiny_model, model: BltModel) -> None:
    rule = PatchingRule("static", patch_size=4)
    texts = as_texts([b"one", b"two \0\0", bytes(range(200)), "Grüße".encode(), b"x" * 70])
    scorer = {"bundle": tiny_model.bundle, "context": 64, "rule": rule}
    with cluster_engine(LOCAL, scorer) as engine:
        found = {one.number: one for one in engine(iter(texts))}
    expected = list(local_engine(model.with_patching(rule), 64)(iter(texts)))
    assert [(one.number, one.bits, one.patches, one.windows) for one in expected] == [
        (number, found[number].bits, found[number].patches, found[number].windows)
        for number in range(len(texts))
    ]
    assert {one.seconds for one in found.values()} == {None}


def test_each_actor_has_its_processors(fake: FakeRay, tiny_model) -> None:
    texts = as_texts([b"text"] * 40)
    for threads, size, takes in ((None, 5, 1), (2, 2, 2)):
        with cluster_engine(LOCAL, {"bundle": tiny_model.bundle, "threads": threads}) as engine:
            assert len(list(engine(iter(texts)))) == 40
        assert fake.asked["compute"]["size"] == size
        assert (fake.asked["num_cpus"], fake.asked["batch_size"]) == (takes, None)
        own = fake.asked["fn_constructor_kwargs"]
        assert (own["device"], own["threads"]) == ("cpu", takes)
    with (
        pytest.raises(OptionError, match=r"threads is 4; .* 1 to 3"),
        cluster_engine(LOCAL, {"bundle": tiny_model.bundle, "threads": 4}),
    ):
        pass
    assert len(fake.started) == fake.ended == 3


def test_an_actor_takes_a_gpu_where_one_is_asked_for(fake: FakeRay, tiny_model) -> None:
    pool = cluster._pool(fake, {"bundle": tiny_model.bundle, "device": "cuda", "threads": None})
    assert (pool.actors, pool.takes["num_gpus"]) == (1, 1)
    assert isinstance(pool.takes["batch_size"], int)
    fake.machines.pop(1)
    with pytest.raises(OptionError, match="no machine of the cluster has a GPU"):
        cluster._pool(fake, {"bundle": tiny_model.bundle, "device": "cuda", "threads": None})


def test_a_cluster_of_its_own_is_bounded_and_says_nothing(fake: FakeRay, tiny_model) -> None:
    with cluster_engine(AUTO, {"bundle": tiny_model.bundle}, processors=3):
        pass
    assert [where for where, _ in fake.started] == [AUTO, LOCAL]
    own = fake.started[1][1]
    assert (own["num_cpus"], own["include_dashboard"], own["log_to_driver"]) == (3, False, False)
    assert own["object_store_memory"] < 300_000_000
    fake.there = True
    with cluster_engine(AUTO, {"bundle": tiny_model.bundle}):
        pass
    assert len(fake.started) == 3


@pytest.mark.parametrize("wrong", ["", "host", "host:", ":6379", "host:0", "host:x", "ray://host:10001"])
def test_what_is_no_address(fake: FakeRay, tiny_model, wrong: str) -> None:
    with (
        pytest.raises(OptionError, match=r"allowed are auto, local and HOST:PORT"),
        cluster_engine(wrong, {"bundle": tiny_model.bundle}),
    ):
        pass
    assert not fake.started


def test_where_no_cluster_answers(fake: FakeRay, tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(BackendError, match=r"no Ray cluster answers at 127.0.0.1:1: "),
        cluster_engine("127.0.0.1:1", {"bundle": tiny_model.bundle}),
    ):
        pass
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    with (
        pytest.raises(OptionError, match="of RAY_ADDRESS"),
        cluster_engine(AUTO, {"bundle": tiny_model.bundle}),
    ):
        pass


@pytest.mark.parametrize(
    ("left", "taken"), [(None, AUTO), ("127.0.0.1:1", LOCAL), ("[::1]:99999", LOCAL), ("no address", AUTO)]
)
def test_a_cluster_that_is_gone_is_not_waited_for(
    fake: FakeRay,
    tiny_model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    left: str | None,
    taken: str,
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    if left is not None:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(left)
    with cluster_engine(AUTO, {"bundle": tiny_model.bundle}):
        pass
    assert fake.started[0][0] == taken


def test_without_ray(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(BackendError, match=r"--ray needs Ray Data: .*pip install .*\[corpus\]") as error,
        cluster_engine(LOCAL, {"bundle": tiny_model.bundle}),
    ):
        pass
    assert "\n" not in str(error.value)


def test_wrong_options_need_no_cluster(fake: FakeRay) -> None:
    with pytest.raises(OptionError, match="context"), cluster_engine(LOCAL, {"bundle": "b", "context": 1}):
        pass
    assert not fake.started


def test_what_an_actor_raises_is_one_line(fake: FakeRay, tiny_model) -> None:
    def fail(error: BaseException) -> BltError:
        def change(batches: Iterator[Any]) -> Iterator[Any]:
            raise error
            yield

        fake.change = change
        with (
            pytest.raises(BltError) as raised,
            cluster_engine(LOCAL, {"bundle": tiny_model.bundle}) as engine,
        ):
            list(engine(iter(as_texts([b"a"]))))
        return raised.value

    told = fail(
        RayError("a traceback\nof lines", BundleError("it is damaged; export again\nFailed to apply"))
    )
    assert (type(told), str(told)) == (BundleError, "it is damaged; export again")
    told = fail(RayError("an actor died\nand more"))
    assert type(told) is BackendError
    assert str(told).startswith("the Ray cluster failed: an actor died; ")


def test_a_text_that_is_lost_is_told_of(fake: FakeRay, tiny_model) -> None:
    fake.change = lambda batches: [next(batches)]
    with cluster_engine(LOCAL, {"bundle": tiny_model.bundle}) as engine:
        found = engine(iter(as_texts([b"text of some bytes"] * 30)))
        with pytest.raises(BackendError, match=r"lost .* of 30 texts"):
            list(found)


def test_another_bundle_on_a_machine(fake: FakeRay, tiny_model) -> None:
    with (
        pytest.raises(BundleError, match="another bundle"),
        cluster_engine(LOCAL, {"bundle": tiny_model.bundle, "fingerprint": "0" * 64}) as engine,
    ):
        list(engine(iter(as_texts([b"a"]))))


@given(sizes=st.lists(st.integers(1, 30), max_size=40), most=st.integers(1, 60), count=st.integers(1, 9))
def test_parts_are_as_full_as_they_may_be(sizes: list[int], most: int, count: int) -> None:
    texts = as_texts([bytes(size) for size in sizes])
    parts = list(cluster._parts(iter(texts), most, count))
    assert [text for part in parts for text in part] == texts
    for part, following in zip_longest(parts, parts[1:]):
        held = sum(len(text.data) for text in part)
        assert len(part) == 1 or (held <= most and len(part) <= count)
        if following is not None:
            assert len(part) == count or held + len(following[0].data) > most


def test_few_texts_are_shared_by_all_actors() -> None:
    texts = as_texts([bytes(100)] * 16)
    assert cluster._block_bytes(texts, 4) == 100
    assert cluster._block_bytes(as_texts([bytes(4000)] * 1000), 4) == 16_384


def test_differences() -> None:
    one, two = ScoredText(0, 1.0, 2, 1, 0.5), ScoredText(1, 2.0, 2, 1)
    same = [two, ScoredText(0, 1.0, 2, 1)]
    assert bench.differences([one, two], same) == 0
    assert bench.differences([one, two], [*same, two]) == 1  # repeated
    assert bench.differences([one, two], [two]) == 1  # lost
    assert bench.differences([one, two], [two, ScoredText(0, 1.5, 2, 1)]) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_process() -> None:
    found = bench.shares(os.getpid())
    assert 0 < found["Private"] <= found["Pss"] <= found["Rss"] < 1 << 40
    assert bench.actor_processes() == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the actors in /proc")
def test_a_killed_worker_costs_no_text(tiny_model) -> None:
    """In a process of its own, since a driver of Ray takes over signals; it can't hang for good."""
    pytest.importorskip("ray.data")
    command = [sys.executable, "-m", "blt_edge.tools.bench.cluster", "survive", "--bundle"]
    command += [str(tiny_model.bundle), "--texts", "400"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        pytest.skip("this machine is too busy for a cluster")
    if "can't start on this machine" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "400 texts, 0 of them lost, repeated or scored otherwise" in done.stdout
    assert "was killed midway" in done.stdout
    assert done.stderr == ""
