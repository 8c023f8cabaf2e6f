"""The corpus: real programs previewed with the real Pulumi and the real pack, on a real engine that nothing changes.
Bad ones are refused for the one rule that they break, legitimate ones pass, and documented Compose files do what
world.yaml says. The exit code, the printed violations and the recorded verdicts have to agree."""

import os
import re
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from cli.verdicts import Kind
from policies.registry import BY_ID, FAMILIES
from tests.deployed import CHECKOUT
from tests.e2e.corpus.cases import HERE, UNBREAKABLE, cases, documented, page
from tests.e2e.corpus.previews import Corpus, Seen, started, tagged

CASES = cases()
PRINTED = re.compile(r"^\s*- \[mandatory\]\s+([a-z-]+)", re.MULTILINE)


@pytest.fixture(scope="module")
def previews(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Seen]]]:
    """The previews of the cases that this run asks for, under way."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.nice(10)  # this process and what it starts: what deploys, in another one, has limits of time
    names = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    chosen = [CASES[name] for name in names if name in CASES]
    images = {image for case in chosen for image in case.images}
    with tagged(images), started(Corpus(tmp_path_factory.mktemp("corpus")), chosen) as under_way:
        yield under_way


@pytest.mark.e2e
@pytest.mark.parametrize("name", CASES)
def test_the_pack_says(name: str, previews: dict[str, Future[Seen]]) -> None:
    case, seen = CASES[name], previews[name].result()
    said = {kind: {one.rule for one in seen.told.verdicts if one.verdict is kind} for kind in Kind}
    stopping = {one.rule for one in seen.told.verdicts if one.stops}
    assert stopping == case.rules, seen.text[-4000:]
    assert set(PRINTED.findall(seen.text)) == stopping, seen.text[-4000:]
    assert not seen.told.fault
    assert "Traceback" not in seen.text
    if case.unread is not None:
        assert seen.code != 0
        assert case.unread in seen.text
    else:
        assert (seen.code != 0) == bool(stopping), seen.text[-4000:]
        assert seen.told.complete or stopping
    if not stopping:
        assert said[Kind.EXEMPT] == case.exempt
    if case.remediated is not None:
        assert said[Kind.REMEDIATED] == case.remediated


def test_the_corpus_breaks_every_rule_that_can_be_broken_alone() -> None:
    broken = {next(iter(case.rules)) for name, case in CASES.items() if name.startswith("bad/")}
    assert broken | UNBREAKABLE.keys() == BY_ID.keys()
    assert not broken & UNBREAKABLE.keys()
    assert {BY_ID[rule].family for rule in broken} == {family.__name__.rpartition(".")[2] for family in FAMILIES}


def test_every_file_of_the_corpus_is_a_case() -> None:
    programs = {case.program for case in CASES.values()}
    assert all(file.read_text() in programs for file in (HERE / "programs").glob("*.py"))
    assert {file.stem for file in (HERE / "world").iterdir()} == documented().keys()


def test_the_documentation_shows_the_corpus() -> None:
    assert (CHECKOUT / "docs/research/compose-corpus.md").read_text() == page()
