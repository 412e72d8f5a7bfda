"""The page about a run: complete, self-contained, and safe whatever a model wrote."""

import base64
import hashlib
import html.parser
import json
import math
import time
import xml.etree.ElementTree as ElementTree

import pytest

from grpo.report import (
    choose_curves,
    draw_heat_maps,
    find_accuracy,
    format_duration,
    measure_gain,
    state_verdict,
    write_curve_svg,
    write_report,
)
from grpo.run_files import Evaluation, read_run

HOSTILE = "</script><script>alert(1)</script><!-- <script> <img src=x onerror=alert(2)> ]]> {{ 7*7 }} \u2028 \ud800"


class Page(html.parser.HTMLParser):
    """A page as a browser's parser sees it: elements with their attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, text):
        if self.elements and self.elements[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += text
        self.texts.append(text)

    def data(self):
        return json.loads(self.scripts[0], parse_constant=pytest.fail)

    def count(self, tag, **attributes):
        return sum(t == tag and attributes.items() <= a.items() for t, a in self.elements)


def make_run(folder, *, steps=40, text="<think>1 + 1 = 2</think> <answer>1 + 1</answer>", name="run"):
    run = folder / name
    (run / "rollouts").mkdir(parents=True)
    (run / "config.yaml").write_text("max_steps: 40\nprompts_per_step: 4\nnum_generations: 2\n")
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            metrics = {
                "step": step,
                "reward": step / 40,
                "rewards/countdown/mean": step / 50,
                "rewards/format/mean": 1.0,
                "completions/mean_length": 50.0 + step,
                "entropy": math.nan if step == 3 else 0.9,
                "kl": None,
                "grad_norm": 0.5,
                "moe/max_load": 1.5,
                "moe/load": [[0.25, 0.75], [0.5, 0.5]],
                "time/sample": 0.6,
                "time/sample_busy": 0.9,
                "time/update": 0.4,
                "step_time": 1.0,
                "tokens_per_second": 9000.0,
            }
            file.write(json.dumps(metrics) + "\n")
    for step in range(1, steps + 1):
        completion = {"text": text, "reward": 1.1, "advantage": 0.7, "breakdown": {"countdown": 1.0}, "status": "ok"}
        problem = {"id": f"p{step}", "prompt": text, "answer": text, "source": text}
        group = {"step": step, "problem": problem, "prompt_text": text + "!", "completions": [completion] * 2}
        (run / f"rollouts/step_{step:06d}.jsonl").write_text(json.dumps(group) + "\n")
    base = {"stage": "base", "task": "countdown", "num_problems": 512, "k": 8, "greedy": 0.26, "mean_length": 60.0}
    entries = [
        {**base, "avg@k": 0.24, "ci95": [0.22, 0.26]},
        {**base, "stage": "final", "greedy": 0.75, "avg@k": 0.72, "ci95": 0.02, "mean_length": 150.0},
    ]
    (run / "evaluation.json").write_text(json.dumps(entries))
    return run


def read_page(run):
    return Page(write_report(run).read_text(encoding="utf-8"))


def make_evaluation(stage, average, interval, num_problems=512):
    return Evaluation(
        stage=stage,
        task="countdown",
        num_problems=num_problems,
        k=8,
        greedy=None,
        average=average,
        interval=interval,
        mean_length=None,
    )


def test_the_page_shows_the_whole_run(tmp_path):
    page = read_page(make_run(tmp_path))
    text = " ".join(" ".join(page.texts).split())
    assert "Accuracy rose from 24.0% to 72.0% on 512 problems of countdown: +48.0 points" in text
    assert "40 of 40" in text
    assert "8 (4 problems × 2)" in text
    titles = ["Reward", "Accuracy", "Completion length", "Entropy", "Gradient norm", "Max expert load", "Step time"]
    assert all(title in page.texts for title in titles)
    assert "KL to the reference" not in text, "a metric without a value has no empty plot"
    assert page.count("figure", **{"data-curve": "0"}) == 1
    assert page.count("figure") == len(page.data()["curves"]) + page.count("img")
    assert page.count("img") == 2, "one map per layer"


def test_the_page_loads_nothing_from_anywhere(tmp_path):
    page = read_page(make_run(tmp_path))
    loading = [
        (tag, key, value)
        for tag, attributes in page.elements
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "action", "xlink:href") and not value.startswith("data:")
    ]
    assert loading == []
    assert page.count("link") == 0
    text = (tmp_path / "run/report.html").read_text()
    assert "url(" not in text
    assert "@import" not in text


def make_run_full_of(text, folder):
    """A run with `text` wherever a run folder can hold text."""
    run = make_run(folder, text=text, name=text.translate({ord("/"): None, 0xD800: None}))
    (run / "config.yaml").write_text(f"note: {json.dumps(text)}\nmax_steps: 40\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 41, f"rewards/{text}/mean": 0.5, f"time/{text}": 1.0}) + "\n")
    evaluations = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps([{**entry, "task": text} for entry in evaluations]))
    return run


def test_text_of_a_model_stays_text(tmp_path):
    hostile = read_page(make_run_full_of(HOSTILE, tmp_path / "hostile"))
    plain = read_page(make_run_full_of("plain", tmp_path / "plain"))
    assert [(tag, sorted(attributes)) for tag, attributes in hostile.elements] == [
        (tag, sorted(attributes)) for tag, attributes in plain.elements
    ]
    assert len(hostile.scripts) == 2
    readable = HOSTILE.replace("\ud800", "?")
    (group, *_) = hostile.data()["groups"]
    assert group["prompt"] == group["answer"] == group["source"] == readable
    assert group["prompt_text"] == readable + "!"
    assert group["completions"][0]["text"] == readable
    assert any("{{ 7*7 }}" in text for text in hostile.texts), "never a template of ours"


def test_only_our_own_script_may_run(tmp_path):
    page = read_page(make_run(tmp_path))
    (policy,) = (a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_a_run_cut_off_anywhere_still_has_a_page(tmp_path):
    whole = make_run(tmp_path)
    names = ["config.yaml", "metrics.jsonl", "evaluation.json", "rollouts/step_000040.jsonl"]
    for name in names:
        content = (whole / name).read_bytes()
        for keep in (0, 1, len(content) // 2, len(content) - 3):
            (whole / name).write_bytes(content[:keep])
            assert read_page(whole).count("h1") == 1
        (whole / name).unlink()
        assert read_page(whole).count("h1") == 1


@pytest.mark.parametrize("step", [0, 1, 17])
def test_a_single_step_has_a_page(tmp_path, step):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": step, "reward": 0.5, "grad_norm": 0.0}) + "\n")
    page = read_page(tmp_path)
    assert page.data()["buckets"] == [[197.0, step, step]]
    assert [curve["lines"][0]["values"] for curve in page.data()["curves"]] == [[0.5], [0.0]]


def test_hovering_shows_the_recorded_values(tmp_path):
    data = read_page(make_run(tmp_path)).data()
    assert [bucket[1:] for bucket in data["buckets"]] == [[step, step] for step in range(1, 41)]
    reward, _, length, entropy, *_ = data["curves"]
    assert reward["lines"][0]["values"] == pytest.approx([step / 40 for step in range(1, 41)])
    assert length == {"unit": "tokens", "lines": [{"label": "mean length", "values": [50 + s for s in range(1, 41)]}]}
    assert entropy["lines"][0]["values"][2] is None


def test_the_old_page_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    run = make_run(tmp_path)
    before = {path.name for path in run.iterdir()}
    (run / "report.html").write_text("old")
    assert write_report(run) == run / "report.html"
    assert (run / "report.html").read_text().endswith("</html>")
    assert {path.name for path in run.iterdir()} == before | {"report.html"}


def test_a_failed_write_keeps_the_old_page(tmp_path):
    run = make_run(tmp_path)
    (run / "report.html").mkdir()
    (run / "report.html/kept").write_text("")
    with pytest.raises(OSError, match="report.html"):
        write_report(run)
    assert not list(run.glob(".report*"))


def test_a_long_run_is_reported_in_time_and_in_bounds(tmp_path):
    run = make_run(tmp_path, steps=300, text="<think>" + "1 + 1 = 2, " * 400 + "</think>")
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    line["moe/load"] = [[1 / 64] * 64 for _ in range(8)]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({**line, "step": step}) + "\n" for step in range(301, 1001))
    start = time.perf_counter()
    path = write_report(run)
    assert time.perf_counter() - start < 3
    assert path.stat().st_size < 5e6


def test_curves_of_rewards_and_phases_come_from_what_was_recorded(tmp_path):
    curves = {curve.title: curve for curve in choose_curves(read_run(make_run(tmp_path)))}
    assert list(curves)[:3] == ["Reward", "Accuracy", "Completion length"]
    assert curves["Accuracy"].unit == "%"
    assert [line.label for line in curves["Accuracy"].lines] == ["countdown"]
    assert [(mark.step, mark.value) for mark in curves["Accuracy"].marks] == [(-math.inf, 0.24), (math.inf, 0.72)]
    assert [line.label for line in curves["Further rewards"].lines] == ["format"]
    assert curves["Step time"].stacked
    assert [line.label for line in curves["Step time"].lines] == ["sample", "update"]


def test_a_first_reward_that_is_no_share_is_not_shown_as_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "rewards/score/mean": 3.5}\n')
    (curve,) = choose_curves(read_run(tmp_path))
    assert (curve.title, curve.unit, curve.marks) == ("Accuracy", "", ())


def test_accuracy_is_the_first_reward():
    assert find_accuracy({"reward": 1, "rewards/a/std": 0, "rewards/a/mean": 0.5, "rewards/b/mean": 0.6}) == (
        "rewards/a/mean"
    )
    assert find_accuracy({"reward": 1}) is None


def wilson(right, total, z=1.959964):
    share = right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    return middle - reach, middle + reach


def test_gain_and_interval_are_newcombes():
    # Newcombe 1998, table II, contrast (a): 56/70 against 48/80, method 10.
    base = make_evaluation("base", 48 / 80, wilson(48, 80))
    final = make_evaluation("final", 56 / 70, wilson(56, 70))
    gain = measure_gain([base, final])
    assert gain.average == pytest.approx(0.2)
    assert gain.interval == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert measure_gain([base]) is None
    assert measure_gain([base, make_evaluation("final", 0.8, None)]).interval is None


@pytest.mark.parametrize(
    ("final", "interval", "verdict"),
    [
        (0.72, (0.70, 0.74), "Accuracy rose from 24.0% to 72.0% on 512 problems of countdown: +48.0 points"),
        (0.10, (0.08, 0.12), "Accuracy fell from 24.0% to 10.0% on 512 problems of countdown: -14.0 points"),
        (0.25, (0.23, 0.27), "No clear change of accuracy: from 24.0% to 25.0% on 512 problems of countdown (+1.0"),
        (0.25, None, "Accuracy went from 24.0% to 25.0% on 512 problems of countdown (+1.0 points; the intervals"),
    ],
)
def test_the_verdict_claims_no_more_than_the_interval(tmp_path, final, interval, verdict):
    entry = {"task": "countdown", "num_problems": 512}
    entries = [
        {**entry, "stage": "base", "avg@k": 0.24, "ci95": [0.22, 0.26]},
        {**entry, "stage": "final", "avg@k": final, "ci95": interval},
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps(entries))
    assert state_verdict(read_run(tmp_path)).startswith(verdict)


def test_the_verdict_of_a_run_that_goes_on(tmp_path):
    run = make_run(tmp_path, steps=20)
    (run / "evaluation.json").unlink()
    assert state_verdict(read_run(run)) == (
        "Step 20 of 40: the mean countdown reward went from 0.03 to 0.39; no final evaluation yet."
    )
    (run / "metrics.jsonl").unlink()
    assert state_verdict(read_run(run)) == "No training step is recorded yet."


def test_heat_maps_name_the_busiest_and_the_idlest_expert():
    maps = draw_heat_maps([{"moe/load": [[0.5, 0.5], [0.9, 0.1]]}, {"moe/load": [[0.5, 0.5], [0.25, 0.75]]}])
    assert [heat_map.title for heat_map in maps] == ["Layer 1 of 2", "Layer 2 of 2"]
    assert maps[1].summary == "last step: expert 1 has 1.50, expert 0 0.50 of an even share"
    assert maps[1].num_experts == 2


@pytest.mark.parametrize("load", [None, [], [[]], [None], "load", [[0.0, 0.0]], [[math.nan, 1.0], 3]])
def test_heat_maps_survive_strange_loads(load):
    maps = draw_heat_maps([{"moe/load": load}, {}])
    assert all(heat_map.image.startswith("data:image/png;base64,") for heat_map in maps)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.9, "1 min 00 s"),
        (312, "5 min 12 s"),
        (11220, "3 h 07 min"),
        (190800, "2 d 05 h"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_the_picture_for_a_readme_is_a_standalone_svg(tmp_path):
    path = write_curve_svg(make_run(tmp_path), tmp_path / "curve.svg")
    root = ElementTree.parse(path).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    assert root.get("width") == "760"
    texts = [element.text for element in root.iter(f"{space}text")]
    assert "Accuracy by step" in texts
    assert "Completion length (tokens) by step" in texts
    strong = [element for element in root.iter(f"{space}path") if "strong" in element.get("class")]
    assert len(strong) == 2
    assert len(root.findall(f".//{space}circle")) == 3, "two evaluations and their legend"


def test_the_picture_falls_back_to_the_reward_and_says_when_there_is_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.1}\n{"step": 2, "reward": 0.4}\n')
    assert "Reward by step" in write_curve_svg(tmp_path, tmp_path / "c.svg").read_text()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n')
    with pytest.raises(ValueError, match="neither a reward nor a mean length"):
        write_curve_svg(tmp_path, tmp_path / "d.svg")
    assert not (tmp_path / "d.svg").exists()


def test_parts_of_the_update_take_its_place_among_the_phases(tmp_path):
    run = make_run(tmp_path, steps=3)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    parts = {"time/logprobs": 0.1, "time/forward_backward": 0.25, "time/optimizer": 0.05, "time/sync": 0.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row | parts) + "\n" for row in rows))
    curves = {curve.title: curve for curve in choose_curves(read_run(run))}
    labels = {line.label for line in curves["Step time"].lines}
    assert labels == {"sample", "logprobs", "forward_backward", "optimizer", "sync"}
