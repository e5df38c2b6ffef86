import subprocess
import sys

import pytest

from fusion_core.errors import MissingExtraError
from fusion_core.plotting import axes_or_new, clean_axes, new_figure, save_figure

pytest.importorskip("matplotlib")


def test_a_picture_is_drawn_and_kept(tmp_path):
    figure = new_figure(2.0, 1.5, "kd-trilateral")
    ax = clean_axes(figure.subplots(), "loss", "step", "nats")
    ax.plot([0, 1], [1, 0])
    save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel()) == ("loss", "step", "nats")
    assert not ax.spines["top"].get_visible()
    assert figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0)


def test_given_axes_are_taken_and_missing_ones_made():
    given = new_figure(2.0, 1.5, "kd-trilateral").subplots()
    assert axes_or_new(given, "kd-trilateral") is given
    made = axes_or_new(None, "kd-trilateral", 3.0, 2.0)
    assert made.figure.get_size_inches().tolist() == [3.0, 2.0]


def test_nothing_global_remembers_a_figure(tmp_path):
    code = (
        "import sys\nfrom fusion_core.plotting import new_figure, save_figure\n"
        f"save_figure(new_figure(1.0, 1.0, 'x'), {str(tmp_path / 'a.png')!r})\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "matplotlib.figure" in done.stdout.split()
    assert "matplotlib.pyplot" not in done.stdout.split()
    assert (tmp_path / "a.png").is_file()


def test_a_missing_extra_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(MissingExtraError, match=r'pip install "ot-fusion\[demo\]"'):
        new_figure(1.0, 1.0, "ot-fusion", "demo")
