"""The prediction command: what it prints for images, and for files that are none."""

import json

import bundles
import pytest
from PIL import Image

from dfs_jax import predict
from dfs_jax.early_exit.preprocessing import Preprocessing

LABELS = ("bat", "cat", "cow", "dog")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "dense.bundle"
    bundles.write(path)
    return str(path)


@pytest.fixture
def images(tmp_path):
    """Paths of five grey images of the network's own size, and their pixels."""
    pixels, paths = bundles.pixels(5, seed=2), []
    for i, image in enumerate(pixels):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(image[..., 0]).save(paths[-1])
    return paths, pixels


def expected_lines(paths, pixels, values):
    logits, exits = bundles.expected(pixels, values)
    return [
        {
            "image": path,
            "label": LABELS[z.argmax()],
            "confidence": pytest.approx(bundles.confidences(z), abs=1e-5),
            "exit": i + 1,
            "cost": 100 * (i + 1),
        }
        for path, z, i in zip(paths, logits, exits, strict=True)
    ]


def test_json_lines(bundle, images, capsys):
    assert predict.main(["--bundle", bundle, "--json", *images[0]]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == expected_lines(*images, bundles.THRESHOLDS[1].values)


@pytest.mark.parametrize(("budget", "setting"), [("100", 0), ("179", 0), ("180", 1), ("1e6", 2)])
def test_the_best_thresholds_within_the_budget_are_used(bundle, images, capsys, budget, setting):
    assert predict.main(["--bundle", bundle, "--budget", budget, "--json", *images[0]]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == expected_lines(*images, bundles.THRESHOLDS[setting].values)


def test_the_table_and_the_files_that_are_no_images(bundle, images, tmp_path, capsys):
    """A text file, a missing file, a torn image and a directory, between images."""
    paths, _ = images
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "torn.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    bad = [str(tmp_path / name) for name in ("text.png", "missing.png", "torn.png", ".")]
    files = [bad[0], paths[0], *bad[1:], paths[1]]
    assert predict.main(["--bundle", bundle, "--budget", "100", *files]) == 1
    out, err = capsys.readouterr()
    header, _, *rows = out.splitlines()
    assert header.split() == ["image", "label", "confidence", "exit", "cost", "(M)"]
    assert [row.split()[0] for row in rows] == paths[:2]
    assert [row.split()[3:] for row in rows] == [["1", "0.000"]] * 2
    for file, reason in zip(
        bad,
        ("cannot be read as an image", "No such file", "cannot be read as an image", "directory"),
        strict=True,
    ):
        assert any(line.startswith(f"{file}: ") and reason in line for line in err.splitlines())
    assert "4 of 6 files could not be read as images" in err


def test_a_bad_file_costs_its_own_answer_alone(bundle, images, tmp_path, capsys, monkeypatch):
    """Whatever it raises; and a picture a pixel high is answered like any other."""
    paths, pixels = images
    Image.fromarray(pixels[0, :1, :, 0]).resize((20_000, 1)).save(tmp_path / "long.png")
    fit = Preprocessing.fit

    def no_memory_for_some(self, image):
        if image.shape == pixels[1].shape and (image == pixels[1]).all():
            raise MemoryError
        return fit(self, image)

    monkeypatch.setattr(Preprocessing, "fit", no_memory_for_some)
    files = [paths[0], paths[1], str(tmp_path / "long.png"), *paths[2:]]
    assert predict.main(["--bundle", bundle, "--json", *files]) == 1
    out, err = capsys.readouterr()
    assert [json.loads(line)["image"] for line in out.splitlines()] == [files[0], *files[2:]]
    assert err == f"{paths[1]}: MemoryError\n1 of 6 files could not be read as images\n"


def test_progress_is_told_on_many_images(bundle, images, capsys):
    assert predict.main(["--bundle", bundle, *images[0]]) == 0
    assert "images/s" not in capsys.readouterr().err
    assert predict.main(["--bundle", bundle, "--budget", "100", *images[0] * 50]) == 0
    progress = [line for line in capsys.readouterr().err.splitlines() if "images/s" in line]
    assert len(progress) == 10
    assert progress[-1].startswith("image 250/250 (100%)  ")


def test_requests_that_cannot_be_carried_out(bundle, images, tmp_path, capsys):
    other = tmp_path / "other"
    other.write_text("no bundle")
    assert predict.main(["--bundle", str(other), *images[0]]) == 2
    assert capsys.readouterr().err == (
        f"error: --bundle: {other} is not a zip file, or not the whole of it\n"
    )
    assert predict.main(["--bundle", bundle, "--budget", "50", *images[0]]) == 2
    assert "--budget: no thresholds cost 50 or less per image" in capsys.readouterr().err
    bundles.write(tmp_path / "plain", family=())
    assert predict.main(["--bundle", str(tmp_path / "plain"), "--budget", "50", "x"]) == 2
    assert "--budget: this bundle has no thresholds for budgets" in capsys.readouterr().err
