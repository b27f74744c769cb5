"""The documents say what the program does: flags, keys, metrics, messages, commands, links and tests are compared."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from flanneld import status
from flanneld.ctl.cli import build_parser
from flanneld.daemon import Daemon
from flanneld.options import FLAGS, parse
from subnet_lease.network_config import parse_network_config, validate_for_allocation
from tests.testbed import documents
from tests.testbed.documents import CONFIGURATION, FIELD_PROBLEMS, ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
SOURCES = ("backends", "cni", "flanneld", "subnet_lease")


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next of the same or a higher level."""
    level = heading.partition(" ")[0]
    assert f"\n{heading}\n" in text, f"there is no heading {heading!r}"
    after = text.split(f"\n{heading}\n", 1)[1]
    return re.split(f"\n#{{1,{len(level)}}} ", after)[0]


def first_column(text: str) -> list[str]:
    """The code words in the first column of every table."""
    rows = (re.match(r"\|([^|]*)\|", line) for line in text.splitlines())
    return [word for row in rows if row for word in re.findall(r"`([^`]+)`", row[1])]


# configuration.md


@pytest.mark.parametrize("group", ["store", "flannel", "own"])
def test_the_tables_of_flags_are_those_of_the_program(group: str) -> None:
    shown = documents.part(CONFIGURATION.read_text(), f"flags-{group}")
    assert shown == documents.flag_table(group), "run script/docs"


def test_every_flag_is_in_a_table() -> None:
    shown = set(first_column(section(CONFIGURATION.read_text(), "## Flags and their variables")))
    assert {flag.variable for flag in FLAGS} <= shown


def test_every_other_variable_that_the_program_reads_is_documented() -> None:
    shown = first_column(section(CONFIGURATION.read_text(), "## Other environment variables"))
    read = set()
    for file in (file for room in ("flanneld", "subnet_lease") for file in (ROOT / room).rglob("*.py")):
        read |= set(re.findall(r"env(?:iron)?\.get\(\"([A-Z_]+)\"", file.read_text()))
    read = {name for name in read if not name.startswith("FLANNELD_")} - {"PATH"}
    assert {"NODE_NAME", "NOTIFY_SOCKET", "KUBERNETES_SERVICE_HOST"} <= read, "the search finds nothing any more"
    assert read <= set(shown)


def test_the_keys_of_the_network_configuration() -> None:
    from subnet_lease.network_config import _NAMES

    shown = first_column(section(CONFIGURATION.read_text(), "## The network configuration"))
    assert sorted(shown) == sorted(_NAMES)


def test_the_defaults_of_the_network_configuration() -> None:
    config = validate_for_allocation(parse_network_config('{"Network": "10.5.0.0/16"}'))
    rows = {
        cells[1].strip("`"): cells[2]
        for line in section(CONFIGURATION.read_text(), "## The network configuration").splitlines()
        if (cells := line.split("|"))[0] == "" and len(cells) > 3
    }
    assert rows["SubnetLen"].startswith(f"{config.subnet_len},")
    assert rows["EnableIPv4"] == f"`{str(config.enable_ipv4).lower()}`"
    assert rows["EnableIPv6"] == f"`{str(config.enable_ipv6).lower()}`"
    assert rows["EnableNFTables"] == f"`{str(config.enable_nftables).lower()}`"
    assert json.loads(rows["Backend"].strip("`")) == {"Type": config.backend_type}
    assert rows["IPv6SubnetLen"].startswith("64,")
    assert config.subnet_min is not None and str(config.subnet_min) == "10.5.1.0/24", "the second subnet"


@pytest.fixture(scope="module")
def daemon() -> Daemon:
    return Daemon(parse([], {})[0])


def test_every_metric_of_a_scrape_is_documented_and_no_other(daemon: Daemon) -> None:
    found = set()
    for family in text_string_to_metric_families(generate_latest(daemon.metrics.registry).decode()):
        if family.name.startswith("flanneld_") and not family.name.endswith("_created"):  # the client's own
            found.add(family.name + ("_total" if family.type == "counter" else ""))
    # Some appear only once there is something to tell.
    source = (ROOT / "flanneld" / "daemon.py").read_text()
    late = re.findall(r'(gauge|labelled_counter)\(\s*"([a-z_]+)"', source)
    assert len(late) > 3, "the search finds nothing any more"
    found |= {f"flanneld_{name}{'_total' if kind == 'labelled_counter' else ''}" for kind, name in late}
    shown = first_column(section(CONFIGURATION.read_text(), "## Metrics"))
    assert sorted(shown) == sorted(found)


def test_every_endpoint_is_documented(daemon: Daemon) -> None:
    source = (ROOT / "flanneld" / "daemon.py").read_text()
    shown = first_column(section(CONFIGURATION.read_text(), "## HTTP endpoints"))
    assert sorted(shown) == sorted(re.findall(r'^ +"(/[a-z/]+)":', source, re.MULTILINE))


@pytest.mark.parametrize("document", [CONFIGURATION, TROUBLESHOOTING], ids=lambda path: path.name)
def test_every_condition_of_readyz_is_documented(document: Path) -> None:
    text = document.read_text()
    assert [name for name in status.CONDITIONS if f"`{name}`" not in text and f"`{name}:`" not in text] == []


# Messages


@cache
def templates() -> tuple[str, ...]:
    """Every text of the program, with … where a value is filled in."""
    found: set[str] = set()
    for file in (file for room in SOURCES for file in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            found |= _texts(node)
    return tuple(found)


def _texts(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    if isinstance(node, ast.JoinedStr):
        parts = [p.value if isinstance(p, ast.Constant) and isinstance(p.value, str) else "…" for p in node.values]
        return {"".join(parts)}
    return set()


def fits(quoted: str, template: str) -> bool:
    """Whether the pieces of a quoted message occur in a text of the program, in their order."""
    at = 0
    for piece in quoted.split("…"):
        at = template.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


def printed(quoted: str) -> bool:
    return any(fits(quoted, template) for template in templates())


def quoted_messages() -> list[str]:
    blocks = re.findall(r"```text\n(.*?)```", TROUBLESHOOTING.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_quoted_messages_are_found() -> None:
    assert len(quoted_messages()) > 50


@pytest.mark.parametrize("message", quoted_messages())
def test_a_quoted_message_is_one_that_the_program_prints(message: str) -> None:
    assert len(message.replace("…", "").strip()) > 10, "too little to recognise"
    # Some are made of several texts, joined at a colon or a semicolon.
    parts = [part.rstrip(":;") for part in re.split(r"(?<=[:;]) ", message)]
    assert printed(message) or all(map(printed, parts)), f"nothing prints {message!r}"


# Commands and links


def commands() -> list[tuple[str, str]]:
    """Lines in fenced blocks and code words that call flannelctl or flanneld, as (document, command)."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text()
        blocks = re.findall(r"```(?:console|sh|bash)\n(.*?)```", text, re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`((?:sudo )?flannel(?:ctl|d) [^`]+)`", " ".join(text.split()))
        lines += [line.strip() for line in re.findall(r"^ {4,}((?:sudo )?flannel(?:ctl|d) .*)$", text, re.MULTILINE)]
        name = str(document.relative_to(ROOT))
        found += [
            (name, match[1]) for line in lines if (match := re.match(r"(?:sudo (?:-E )?)?(flannel(?:ctl|d)\b.*)", line))
        ]
    return sorted(set(found))


def known_flags(words: list[str]) -> set[str]:
    """The flags of the program, or of the subcommand, that a command line names."""
    if words[0] == "flanneld":
        return {f"--{flag.name}" for flag in FLAGS} | {"-v", "--help"}
    parser: argparse.ArgumentParser = build_parser()
    for word in words[1:]:
        choices = next((a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
        if choices is None:
            break
        if word.isupper() or word.startswith("-"):  # "flannelctl COMMAND --help"
            continue
        assert word in choices, f"flannelctl has no {word!r} here; it has {', '.join(choices)}"
        parser = choices[word]
    return set(parser._option_string_actions)


@pytest.mark.parametrize(("document", "command"), commands())
def test_commands_and_their_flags_exist(document: str, command: str) -> None:
    words = shlex.split(command.partition(" | ")[0].replace("…", ""), comments=True)
    flags = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert flags <= known_flags(words), f"{document}: {command}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    prose = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def anchors(file: Path) -> set[str]:
    """What a link may name: headings as GitHub makes them, and named places."""
    text = file.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r'<a name="([^"]+)">', text))


def test_every_document_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [d.name for d in (ROOT / "docs").glob("*.md") if d.name != "README.md" and f"({d.name})" not in index]
    missing += [d.name for d in (ROOT / "docs" / "adr").glob("*.md") if f"(adr/{d.name})" not in index]
    assert missing == []


def test_variables_in_the_documents_are_known() -> None:
    known = {flag.variable for flag in FLAGS}
    for document in DOCUMENTS:
        for name in re.findall(r"\bFLANNELD_[A-Z0-9_]+\b", document.read_text()):
            assert name in known or name.endswith("_"), f"{document.name}: {name}"


# field-problems.md


def problem_rows() -> dict[int, list[str]]:
    rows = re.findall(r"^\|\[?(\d+)\]?(?:\(#tests-\d+\))?\|(.*)\|$", FIELD_PROBLEMS.read_text(), re.MULTILINE)
    return {int(number): rest.split("|") for number, rest in rows}


def test_every_field_problem_has_a_row_with_a_status() -> None:
    rows = problem_rows()
    assert list(rows) == list(range(1, 47))
    assert {row[-1] for row in rows.values()} <= {"held", "partly", "not yet"}


def test_what_is_said_to_hold_is_tested_and_what_is_not_built_is_not() -> None:
    pinned = documents.pinned()
    for number, row in problem_rows().items():
        assert (number in pinned) == (row[-1] != "not yet"), f"field problem {number} is {row[-1]!r}"
    assert set(pinned) <= set(problem_rows())


def test_the_tests_that_are_named_exist() -> None:
    listed = documents.part(FIELD_PROBLEMS.read_text(), "tests")
    named = {(file, test) for file, tests in _listed(listed) for test in tests}
    real = {tuple(name.partition("::")[::2]) for names in documents.pinned().values() for name in names}
    assert sorted(named - real) == [], "run script/docs"
    assert {int(n) for n in re.findall(r"\*\*(\d+)\*\*", listed)} == set(documents.pinned()), "run script/docs"


def _listed(text: str) -> list[tuple[str, list[str]]]:
    found = []
    for line in text.splitlines():
        for entry in line.split("** ", 1)[1].split("; "):
            file, *tests = re.findall(r"`([^`]+)`", entry)
            found.append((file, tests or [""]))
    return found
