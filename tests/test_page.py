"""The report of an output: one HTML file, about what the receipt says, for people and their browsers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from converter import Gates, convert
from converter.errors import BadCheckpoint
from converter.page import benchmark_page, head, page
from converter.samples import Sample
from tests.limits import HANG
from tests.models import save_adapter, save_base

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """A page as a browser reads it: elements with their attributes, its text, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self._open) and "svg" not in self._open:
            self.tables[-1][-1][-1] += data.strip()

    def attributes(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, first: str) -> list[list[str]]:
        """The first table whose first cell is this."""
        return next(rows for rows in self.tables if rows[0][0] == first)


@pytest.fixture(scope="module")
def receipt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("made")
    base = save_base(folder / "base", "llama")
    out = convert(base, save_adapter(folder / "adapter", base, "llama"), folder / "out").out
    found: dict[str, Any] = json.loads((out / "conversion.json").read_text())
    return found


def with_origin(receipt: dict[str, Any], **origin: str) -> dict[str, Any]:
    return receipt | {"origin": receipt["origin"] | origin}


def test_it_needs_nothing_from_outside(receipt: dict[str, Any]) -> None:
    text = page(receipt, "out")
    found = Page(text)

    assert {name for name, _ in found.elements} & {"script", "link", "img", "iframe", "object", "form"} == set()
    assert not [attributes for _, attributes in found.elements if {"src", "onload", "onclick"} & attributes.keys()]
    assert not re.search(r"url\(|@import", text)
    assert "default-src 'none'" in text
    assert found.attributes("a") == []


def test_inputs_of_the_hub_are_linked_at_their_commit_and_others_are_not(receipt: dict[str, Any]) -> None:
    made_of = {"base_name": "org/base", "base_commit": "c" * 40, "adapter_name": "org/ad", "adapter_commit": "d" * 40}

    found = Page(page(with_origin(receipt, **made_of), "out"))
    links = [attributes["href"] for attributes in found.attributes("a")]

    assert links == [f"https://huggingface.co/org/{name}/tree/{c * 40}" for name, c in (("base", "c"), ("ad", "d"))]
    assert f"sha256 of its config and tensors: {receipt['origin']['adapter'][:12]}…" in found.text
    assert receipt["origin"]["adapter"] not in found.text


def test_the_heat_maps_have_each_figure_as_text_in_its_layer_and_module(receipt: dict[str, Any]) -> None:
    found = Page(page(receipt, "out"))
    survival, error = (rows for rows in found.tables if rows[0][0] == "layer")

    for rows, key in ((survival, "survival"), (error, "error")):
        modules = rows[0][1:]
        cells = {(row[0], module): cell for row in rows[1:] for module, cell in zip(modules, row[1:], strict=True)}
        for name, tensor in receipt["tensors"].items():
            if key in tensor and tensor["action"] == "quantize":
                layer, module = re.findall(r"layers\.(\d+)\.(.*)\.weight", name)[0]
                assert cells[layer, module] == f"{tensor[key]:.4f}"
        assert len([cell for cell in cells.values() if cell]) == 14
    alphas = [float(a["style"].removeprefix("--a:")) for a in found.attributes("td") if "heat" in a.get("class", "")]
    assert (min(alphas), max(alphas)) == (0.04, 0.55), "text on it stays readable"


def test_experts_of_a_layer_are_one_column_with_their_worst(receipt: dict[str, Any]) -> None:
    entry = {"action": "quantize", "origin": "base", "survival": 0.9}
    tensors = {
        f"model.layers.0.mlp.experts.{number}.up_proj.weight": entry | {"error": 0.01 * number}
        for number in range(1, 9)
    }

    error = [rows for rows in Page(page(receipt | {"tensors": tensors}, "out")).tables if rows[0][0] == "layer"][1]

    assert error == [["layer", "mlp.experts.*.up_proj"], ["0", "0.0800"]]


def test_the_ten_worst_tensors_are_listed_the_worst_first(receipt: dict[str, Any]) -> None:
    rows = Page(page(receipt, "out")).table("tensor")[1:]

    survivals = {name: tensor["survival"] for name, tensor in receipt["tensors"].items() if "survival" in tensor}
    assert [row[0] for row in rows] == sorted(survivals, key=lambda name: survivals[name])[:10]


def test_the_histogram_counts_every_tensor_and_says_so_in_words(receipt: dict[str, Any]) -> None:
    text = page(receipt, "out")

    labels = [a["aria-label"] for a in Page(text).attributes("svg") if "Histogram" in a.get("aria-label", "")]
    assert [label.partition(":")[0] for label in labels] == [
        "Histogram of the survival of 14 tensors",
        "Histogram of the relative error of 14 tensors",
    ]
    counts = [int(count) for count in re.findall(r"<title>[\d.]+ to [\d.]+: (\d+)</title>", text)]
    assert (sum(counts[:20]), sum(counts[20:]), len(counts)) == (14, 14, 40)


def test_the_verdict_says_whether_every_gate_is_reached(receipt: dict[str, Any]) -> None:
    no_gate, reached, missed = (page(receipt, "out", gates) for gates in (Gates(), Gates(0.1, 0.5), Gates(0.1, 0.05)))

    assert "✓ complete; no gate was asked for" in Page(no_gate).text
    assert "✓ complete, and every gate is reached" in Page(reached).text
    assert "✗ a gate is missed: " in Page(missed).text
    rows = Page(missed).table("gate")
    worst = receipt["summary"]["relative_error"]
    assert [row[-1] for row in rows[1:]] == ["✓ reached", "✗ missed"]
    assert rows[2][:4] == ["relative error at most", "0.05", f"{worst['worst']:.4f}", worst["worst_tensor"]]


def test_sizes_before_and_after_are_told(receipt: dict[str, Any]) -> None:
    rows = Page(page(receipt, "out")).table("before: the base")

    assert [row[1] for row in rows] == [f"{receipt['summary']['bytes'][key]:,} bytes" for key in ("base", "output")]


def test_whoever_can_not_see_colours_or_the_screen_reads_the_same(receipt: dict[str, Any]) -> None:
    text = page(receipt, "out", Gates(0.5, 0.5))
    found = Page(text)

    assert found.attributes("html") == [{"lang": "en"}]
    assert all(attributes.get("scope") in ("row", "col") for attributes in found.attributes("th"))
    assert all(a.get("role") == "img" and a.get("aria-label") for a in found.attributes("svg"))
    assert [name for name, _ in found.elements].count("main") == 1
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_a_hostile_name_is_text(receipt: dict[str, Any]) -> None:
    entry = {"action": "quantize", "origin": "base", "error": 0.1, "survival": 0.9}
    hostile = "<script>alert(1)</script>"
    made = with_origin(receipt, base_name=f'"><{hostile}', base_commit="c")

    text = page(made | {"tensors": {f"{hostile}.0.a": entry}, "architecture": hostile}, hostile)

    assert "<script" not in text
    assert hostile in Page(text).text


@pytest.mark.parametrize("missing", ["tensors", "recipe", "origin", "files", "versions", "fingerprint"])
def test_a_receipt_that_can_not_be_understood_is_refused(missing: str, receipt: dict[str, Any]) -> None:
    with pytest.raises(BadCheckpoint, match=r"conversion.json: .*can't be understood"):
        page({key: value for key, value in receipt.items() if key != missing}, "out")


def test_figures_that_are_infinite_and_outputs_without_an_adapter_have_a_page(receipt: dict[str, Any]) -> None:
    tensors = {
        "a.0.b.weight": {"action": "quantize", "origin": "base", "error": "Infinity"},
        "a.1.b.weight": {"action": "quantize", "origin": "base", "error": 0.25},
    }

    found = Page(page(receipt | {"tensors": tensors}, "out"))

    assert found.table("tensor")[1:] == [["a.0.b.weight", "–", "inf"], ["a.1.b.weight", "–", "0.2500"]]
    assert found.table("layer") == [["layer", "b"], ["1", "0.2500"]]


RUN = [
    Sample(0.0, "planning", 0, 300_000_000),
    Sample(2.0, "converting", 0, 350_000_000),
    Sample(3.0, "converting", 100_000_000, 410_000_000),
    Sample(5.0, "converting", 500_000_000, 400_000_000),
    Sample(6.0, "sealing", 500_000_000, 380_000_000),
]


def test_memory_and_rate_over_time_are_drawn_and_said(receipt: dict[str, Any]) -> None:
    found = Page(page(receipt, "out", samples=RUN))

    assert found.table("stage")[1:] == [
        ["planning", "2.0 s", "–", "350 MB"],
        ["converting", "4.0 s", "125 MB/s", "410 MB"],
        ["sealing", "0.0 s", "–", "380 MB"],
    ]
    lines = [a["points"] for a in found.attributes("polyline")]
    assert [len(line.split()) for line in lines] == [5, 2]
    assert lines[1] == "0.0,75.0 640.0,20.0", "100 MB/s, then 200 MB/s, the most"
    labels = [a["aria-label"] for a in found.attributes("svg")]
    assert "Memory of the process, from 0.0 s to 6.0 s: at most 410 MB" in labels
    assert "Bytes of the base a second, from 3.0 s to 5.0 s: at most 200 MB/s" in labels


def test_without_samples_it_says_why_there_are_no_lines(receipt: dict[str, Any]) -> None:
    found = Page(page(receipt, "out"))

    assert found.attributes("polyline") == []
    assert "Not known: only --report while converting draws them" in found.text


def test_the_head_alone_is_for_notebooks(receipt: dict[str, Any]) -> None:
    found = Page(head(receipt))

    assert "14 merged, 14 quantized, 7 kept" in found.text
    assert len(found.tables) == 1


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_it(receipt: dict[str, Any], tmp_path: Path) -> None:
    written = page(receipt, "out", Gates(0.1, 0.05), RUN)
    (tmp_path / "report.html").write_text(written)

    ran = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{tmp_path}/report.html"],
        capture_output=True,
        text=True,
        timeout=HANG,
        check=True,
    )

    shown = Page(ran.stdout)
    assert shown.tables == Page(written).tables
    assert shown.attributes("polyline") == Page(written).attributes("polyline")
    assert len(shown.attributes("rect")) == len(Page(written).attributes("rect")) > 40
    assert "✗ a gate is missed" in shown.text


def test_a_page_of_latency_has_each_model_of_each_server_and_what_speaks_against_it() -> None:
    def of(seconds: float) -> dict[str, Any]:
        spread = {"median": seconds, "least": seconds / 2, "most": seconds * 2}
        return {"first_token": spread, "token": spread, "rate": {"median": 5.0, "least": 4.0, "most": 6.0}}

    ratios = {"first_token": 2.0, "token": 3.0, "rate": 0.5}
    server = {"through": "vllm", "version": "1.2", "device": "<cpu>", "why_not": {"base + adapter": "<no LoRA>"}}
    server |= {"latencies": {"merged, 16 bits": of(0.1), "output": of(0.2)}, "notes": ["the medians & so on"]}
    told = {
        "output": "nf4",
        "workload": {"prompt_tokens": 9, "rounds": 3},
        "machine": {"processors": 2, "load": 1.25},
        "servers": [server | {"ratios": {"output": ratios}}],
        "notes": ["a busy machine"],
    }

    found = Page(benchmark_page(told, "out<1>"))

    assert found.tables[0][1:] == [
        ["merged, 16 bits", "100.0 (50.0 to 200.0)", "100.0 (50.0 to 200.0)", "5.0 (4.0 to 6.0)", "–", "–", ""],
        ["output, nf4", "200.0 (100.0 to 400.0)", "200.0 (100.0 to 400.0)", "5.0 (4.0 to 6.0)", "2.00", "3.00", ""],
    ]
    assert found.tables[1] == [["base + adapter", "<no LoRA>"]]
    assert found.tables[2] == [
        ["prompt tokens", "9"],
        ["rounds", "3"],
        ["processors", "2"],
        ["load of the machine as it began", "1.2"],
    ]
    assert [rect["width"] for rect in found.attributes("rect")] == ["100", "200"]
    for said in ("Latency report: out<1>", "Through vllm 1.2, on <cpu>", "the medians & so on", "a busy machine"):
        assert said in found.text
