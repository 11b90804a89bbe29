"""The fuzz targets in short: their seeds, mutations from a fixed seed, and every input that once was a finding."""

from __future__ import annotations

from pathlib import Path
from random import Random
from time import process_time

import pytest
from tests.fuzz.targets import Target, targets

CORPUS = Path(__file__).parent / "corpus"
FINDINGS = sorted(path.relative_to(CORPUS) for path in CORPUS.glob("*/*"))
NAMES = ("request", "elements", "picture", "manifest", "bundle", "golden", "weights", "tokens", "settings")
MUTATIONS = 300


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("fuzz"))


def test_the_names_are_all(every: dict[str, Target]) -> None:
    assert set(every) == set(NAMES)
    assert sum(target.runs for target in every.values()) >= 200_000


@pytest.mark.parametrize("name", NAMES)
def test_mutations_of_the_seeds(every: dict[str, Target], name: str) -> None:
    target, rng = every[name], Random(name)
    pool = list(target.seeds)
    for seed in target.seeds:
        target.check(seed)
    for _ in range(MUTATIONS):
        data = target.mutate(rng.choice(pool), rng)[: target.max_length]
        start = process_time()
        target.check(data)
        assert process_time() - start < 1
        # mutations of mutations too
        if rng.random() < 0.2:
            pool.append(data)


@pytest.mark.parametrize("finding", FINDINGS, ids=str)
def test_what_was_once_a_finding(every: dict[str, Target], finding: Path) -> None:
    start = process_time()
    every[finding.parts[0]].check((CORPUS / finding).read_bytes())
    assert process_time() - start < 1
