"""The page of a grid: its numbers, computed again, its markup, and how a browser shows it."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import synthetic
from etils import epath

from dfs_jax.sweeps import figures, page, report, summaries

T975 = {1: 12.706204736432095, 2: 4.302652729911275}  # Student's t by degrees of freedom
BASELINE = {"method": "joint"}


def groups_of(records):
    return summaries.summaries(records)


def values(records, method):
    """(seeds, N + 1) of the exits and the ensemble, in percent."""
    names = [f"test/exit{i}/top1" for i in (1, 2, 3)]
    found = [r.scores for r in records if r.labels["method"] == method]
    return 100 * np.array([[s[n] for n in (*names, "test/ensemble/top1")] for s in found])


def half(column):
    count = len(column)
    return T975[count - 1] * column.std(ddof=1) / np.sqrt(count)


def written(records, tmp_path, baseline=BASELINE):
    """The page without plotly's script."""
    report.write(epath.Path(tmp_path), records, baseline)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(text) > 4e6, "plotly's script is in the file"
    return re.sub(r"<script>.*?</script>", "", text, count=1, flags=re.DOTALL)


def tables(text):
    """Lines of cells of every table of the page by its heading."""
    found = {}
    for part in text.split("<section>")[1:]:
        heading = re.search(r"<h2>(.*?)</h2>", part)[1]
        rows = re.findall(r"<tr.*?</tr>", part, flags=re.DOTALL)
        cells = [re.findall(r"<t[hd].*?</t[hd]>", row, flags=re.DOTALL) for row in rows]
        plain = [[html.unescape(re.sub(r"<[^>]*>", "", c)).strip() for c in row] for row in cells]
        if plain:
            found[heading] = plain
    return found


def test_tables_have_means_intervals_and_paired_differences(tmp_path):
    records = synthetic.grid(seeds=3)
    found = tables(written(records, tmp_path))
    accuracy, gaps = found["Accuracy and cost"], found["Differences to the baseline"]
    assert accuracy[0][1:] == ["seeds", "exit 1", "exit 2", "exit 3", "ensemble", "mean of exits"]
    for row, method in zip(accuracy[1:], ("joint", "dfs", "ge"), strict=True):
        own = values(records, method)
        columns = [*own.T, own[:, :3].mean(axis=1)]
        assert row[0] == f"●{method}"
        assert row[2:] == [f"{c.mean():.2f} ± {half(c):.2f}" for c in columns]
    assert [row[0] for row in gaps[1:]] == ["●dfs", "●ge"]
    for row, method in zip(gaps[1:], ("dfs", "ge"), strict=True):
        columns = (values(records, method) - values(records, "joint")).T
        assert row[1:5] == [f"{c.mean():+.2f} ± {half(c):.2f}" for c in columns]
        assert row[5:] == ["3", "joint"]


def test_speed_and_conflict_are_means_of_what_the_runs_logged(tmp_path):
    records = synthetic.grid(seeds=2)
    found = tables(written(records, tmp_path))
    dfs = [r for r in records if r.labels["method"] == "dfs"]
    speed, conflict = found["Speed"], found["Conflict between exits"]
    assert speed[0][1:] == ["images/s", "ms a step", "GFLOP a step", "seconds of the run"]
    images = np.mean([r.speed["train/images_per_second"] for r in dfs])
    milliseconds = 1e3 * np.mean([r.speed["train/step_seconds"] for r in dfs])
    seconds = np.mean([r.seconds for r in dfs])
    assert speed[2][1:] == [f"{images:,.0f}", f"{milliseconds:,.4g}", "3", f"{seconds:,.0f}"]
    cosines = np.mean([r.conflict.overall.mean(axis=0) for r in dfs], axis=0)
    assert conflict[0][1:] == ["1 and 2", "1 and 3", "2 and 3"]
    assert conflict[2][1:] == [f"{cosines[p]:.3f}" for p in ((0, 1), (0, 2), (1, 2))]


def test_what_no_run_has_is_left_out(tmp_path):
    records = [
        r._replace(conflict=None, curves={}, budgeted=None, speed={}, step_flops=None, seconds=None)
        for r in synthetic.grid(methods=["joint"], seeds=1)
    ]
    text = written(records, tmp_path)
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Accuracy and cost"]
    assert "±" not in str(tables(text)), "one seed, no interval"


def traces(picture, mode):
    return [t for t in picture.figure.data if t.type == "scatter" and t.mode == mode]


def test_pictures_have_the_same_numbers():
    records = synthetic.grid(seeds=2)
    groups = groups_of(records)
    lines = traces(figures.accuracy(groups), "lines+markers")
    for line, method in zip(lines, ("joint", "dfs", "ge"), strict=True):
        exits = values(records, method)[:, :3].T
        np.testing.assert_allclose(line.y, exits.mean(axis=1))
        np.testing.assert_allclose(line.error_y.array, [half(c) for c in exits])
        np.testing.assert_allclose(line.x, np.array(synthetic.COSTS) / 1e6, atol=0.5)
    forest = [t for t in figures.differences(groups, BASELINE).figure.data if t.error_x.array]
    for points, method in zip(forest, ("dfs", "ge"), strict=True):
        gaps = (values(records, method) - values(records, "joint")).T
        np.testing.assert_allclose(points.x, gaps.mean(axis=1))
        np.testing.assert_allclose(points.error_x.array, [half(c) for c in gaps])
        assert np.rint(points.y).tolist() == [0, 1, 2, 3], "within the band of its exit"


def test_curves_are_means_over_seeds_with_a_band():
    records = synthetic.grid(seeds=2)
    groups = groups_of(records)
    learning = figures.learning(groups)
    assert learning.choices == ("mean of exits", "exit 1", "exit 2", "exit 3", "ensemble")
    dfs = [r for r in records if r.labels["method"] == "dfs"]
    wanted = {"configuration": 1, "choice": "exit 2"}
    band, line = (t for t in learning.figure.data if t.meta == wanted)
    curves = 100 * np.array([r.curves["exit2"] for r in dfs])
    np.testing.assert_allclose(line.y, curves.mean(axis=0))
    np.testing.assert_allclose(band.y, [*curves.max(axis=0), *curves.min(axis=0)[::-1]])
    _, line = (t for t in figures.budgeted(groups).figure.data if t.meta["configuration"] == 1)
    np.testing.assert_allclose(line.x, [row["cost"] / 1e6 for row in dfs[0].budgeted])
    accuracies = 100 * np.array([[row["top1"] for row in r.budgeted] for r in dfs])
    np.testing.assert_allclose(line.y, accuracies.mean(axis=0))


def test_every_trace_says_whose_it_is():
    groups = groups_of(synthetic.grid())
    found = [
        figures.accuracy(groups),
        figures.differences(groups, BASELINE),
        figures.learning(groups),
        figures.budgeted(groups),
        figures.speed(groups),
        figures.conflict(groups),
    ]
    for picture in found:
        for trace in picture.figure.data:
            assert trace.meta["configuration"] in range(len(groups))
            assert not picture.choices or trace.meta["choice"] in picture.choices


def test_markup_sorts_switches_and_needs_no_network(tmp_path):
    records = synthetic.grid(methods=("a</script><b>", "joint"))
    text = written(records, tmp_path)
    assert text.count('<input type="checkbox" checked') == 2
    headers = re.findall(r"<th>.*?</th>", text)
    assert headers
    assert all('<button type="button">' in header for header in headers)
    rows = re.findall(r'<tr data-configuration="(\d)">(.*?)</tr>', text, flags=re.DOTALL)
    assert rows
    for _, cells in rows:
        assert cells.count("<td") == cells.count('<td data-value="')
    assert "a</script><b>" not in text
    assert "a&lt;/script&gt;&lt;b&gt;" in text
    assert not re.search(r"<link|<script src|<img|@import|url\(|https?://", text)


def test_equal_runs_are_shown_once(tmp_path):
    def config(method, _):
        beta = float(method.removeprefix("joint ").removeprefix("dfs "))
        return {"surgery.partition": method.startswith("dfs"), "surgery.beta": beta}

    methods = ("joint 0.25", "joint 0.5", "dfs 0.25", "dfs 0.5")
    records = synthetic.grid(methods, seeds=2, config_of=config)
    text = written(records, tmp_path, {"method": "joint 0.25"})
    assert "shown once: joint 0.25 = joint 0.5." in text
    accuracy, gaps = tables(text)["Accuracy and cost"], tables(text)["Differences to the baseline"]
    assert [row[0] for row in accuracy[1:]] == ["●joint 0.25 / joint 0.5", "●dfs 0.25", "●dfs 0.5"]
    first = values(records, "joint 0.25")[:, 0]
    assert accuracy[1][2] == f"{first.mean():.2f} ± {half(first):.2f}"
    assert [row[0] for row in gaps[1:]] == ["●dfs 0.25", "●dfs 0.5"]
    fields = tables(text)["What the configurations differ in"]
    assert fields[0][1:] == ["surgery.partition", "surgery.beta"]
    assert [row[1:] for row in fields[1:]] == [["False", ""], ["True", "0.25"], ["True", "0.5"]]


def test_without_a_baseline_joint_training_is_one():
    records = synthetic.grid(methods=("dfs", "joint"))
    assert summaries.baseline_of(records, {}) == {"method": "joint"}
    assert summaries.baseline_of(synthetic.grid(methods=("dfs", "ge")), {}) == {"method": "dfs"}
    assert summaries.baseline_of(records, {"method": "dfs"}) == {"method": "dfs"}
    assert summaries.baseline_of(synthetic.grid(methods=["dfs"]), {}) == {}


# Frames as wide as a screen and as a telephone. What is seen in them is told as JSON.
FRAMES = """<!doctype html><meta charset="utf-8"><pre id="told"></pre>
<iframe src="report.html" width="1200" height="900"></iframe>
<iframe src="report.html" width="400" height="900"></iframe>
<script>
const look = ({ contentDocument: page, contentWindow: window }) => {
  const all = (selector) => [...page.querySelectorAll(selector)];
  const plots = all(".js-plotly-plot"), root = page.documentElement;
  const shown = () => plots.map((p) => p.data.filter((t) => t.visible).length);
  const first = () => page.querySelector("tbody tr").dataset.configuration;
  const told = {
    width: root.clientWidth,
    wide: root.scrollWidth,
    drawn: plots.map((p) => p.querySelectorAll(".main-svg .trace, .main-svg .point").length),
    fits: plots.map((p) => p.getBoundingClientRect().right <= root.clientWidth),
    before: shown(),
  };
  all("#legend input")[1].click();
  told.after = shown();
  told.rows = all('tr[data-configuration="1"]').map((row) => row.hidden);
  all("#legend input")[1].click();
  const header = page.querySelectorAll("th button")[2];
  header.click();
  told.highest = first();
  header.click();
  told.lowest = first();
  return told;
};
addEventListener("load", () => setTimeout(() => {
  const frames = [...document.querySelectorAll("iframe")];
  document.querySelector("#told").textContent = JSON.stringify(frames.map(look));
}, 1000));
</script>
"""


@pytest.mark.slow
def test_a_browser_draws_it_on_a_screen_and_on_a_telephone(tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed; apt-get install chromium")
    records = synthetic.grid()
    written(records, tmp_path)
    (tmp_path / "frames.html").write_text(FRAMES)
    dumped = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",  # one page looks into the other
            "--window-size=1300,2000",
            "--virtual-time-budget=20000",
            "--dump-dom",
            "--host-resolver-rules=MAP * ~NOTFOUND",  # no network
            f"--user-data-dir={tmp_path / 'profile'}",
            (tmp_path / "frames.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    told = json.loads(html.unescape(re.search(r'<pre id="told">(.*?)</pre>', dumped)[1]))
    first = [values(records, m)[:, 0].mean() for m in ("joint", "dfs", "ge")]
    for frame, width in zip(told, (1200, 400), strict=True):
        assert width - 20 <= frame["width"] <= width
        assert frame["wide"] <= frame["width"], "nothing scrolls sideways"
        assert len(frame["drawn"]) == 6
        assert all(frame["drawn"])
        assert all(frame["fits"])
        for before, after in zip(frame["before"], frame["after"], strict=True):
            assert 0 < after < before, "switched off in every picture"
        assert frame["rows"]
        assert all(frame["rows"])
        assert frame["highest"] == str(np.argmax(first))
        assert frame["lowest"] == str(np.argmin(first))


def test_networks_with_other_numbers_of_exits_stand_side_by_side(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"large": synthetic.COSTS, "small": synthetic.COSTS[:2], "one": synthetic.COSTS[:1]}
    records = [
        synthetic.record(n, {"network": name, "method": method, "seeds": "0"}, rng, costs=costs)
        for n, (name, costs) in enumerate(sizes.items())
        for method in ("joint", "dfs")
    ]
    found = tables(written(records, tmp_path))
    accuracy, gaps = found["Accuracy and cost"], found["Differences to the baseline"]
    filled = [[bool(cell) for cell in row[2:6]] for row in accuracy[1:]]
    assert filled[::2] == [[True] * 4, [True, True, False, True], [True, False, False, True]]
    assert [[bool(cell) for cell in row[1:5]] for row in gaps[1:]] == filled[::2]


def test_page_of_one_configuration():
    groups = groups_of(synthetic.grid(methods=["dfs"], seeds=1))
    assert "Differences to the baseline" not in page.page(groups, {})
