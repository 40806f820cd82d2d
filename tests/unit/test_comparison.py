"""Two evaluations side by side: read from their files, refused where they are not of the same thing."""

import json
from pathlib import Path

import pytest

from sltscale.cli import main
from sltscale.errors import InputError
from sltscale.evaluation import report
from sltscale.evaluation.comparison import compare_runs
from sltscale.evaluation.translation import score

REFERENCES = [f"am {day}. scheint die sonne im {place}" for day in range(10) for place in ("süden", "norden")]
GOOD = [text if i % 3 else "regen" for i, text in enumerate(REFERENCES)]
BAD = [' "am 3. regnet es' if i % 2 else text for i, text in enumerate(REFERENCES)]


def evaluated(folder: Path, hypotheses: list[str], references: list[str] = REFERENCES, **options: object) -> Path:
    """A folder as an evaluation leaves it."""
    ids = [f"clip-{i}" for i in range(len(references))]
    scores = score(hypotheses, references, language="de", **options)  # type: ignore[arg-type]
    report.write_translation(folder, ids, hypotheses, references, scores | {"language": "de", "split": "test"})
    return folder


def test_scores_are_those_of_the_evaluation(tmp_path: Path) -> None:
    evaluated(tmp_path / "run/evaluation/test", BAD, convention="13a", append_period=True)
    evaluated(tmp_path / "other", GOOD, convention="13a", append_period=True)
    found, convention = compare_runs(tmp_path / "run", tmp_path / "other", "test", samples=50)
    assert convention == "13a|level:word|period:appended"
    assert list(found) == ["bleu4", "chrf", "rouge_l"]
    for folder, side in (("run/evaluation/test", "first"), ("other", "second")):
        metrics = json.loads((tmp_path / folder / "metrics.json").read_text())
        for name, values in found.items():
            assert getattr(values, side) == pytest.approx(metrics[name], abs=1e-9)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(tmp_path / "a", BAD)
    evaluated(tmp_path / "b", GOOD)
    arguments = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--samples", "100"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["bleu4", "chrf", "rouge_l"]
    assert lines[5] == "slt|level:word, test; 95 % intervals and paired bootstrap, 100 resamples"
    assert main([*arguments, "--json"]) == 0
    as_json = json.loads(capsys.readouterr().out)
    bleu = as_json["scores"]["bleu4"]
    assert f"{bleu['first']:.2f} ± {bleu['first_interval']:.2f}" in lines[2]
    assert f"{bleu['second']:.2f} ± {bleu['second_interval']:.2f}" in lines[2]
    assert lines[2].endswith(f"{bleu['p']:.4f}")
    assert main([*arguments, "--split", "dev"]) == 2
    assert "holds scores of the split test, not dev" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "c")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    plain = evaluated(tmp_path / "plain", GOOD)
    with pytest.raises(InputError, match=r"has convention slt\|level:word, .* 13a\|level:word"):
        compare_runs(plain, evaluated(tmp_path / "other", GOOD, convention="13a"), "test")
    with pytest.raises(InputError, match=r"has number of clips 20, .* 10"):
        compare_runs(plain, evaluated(tmp_path / "half", GOOD[:10], REFERENCES[:10]), "test")
    with pytest.raises(InputError, match=r"has clip clip-1 \(am 0\. .*\) where .* has clip-1 \(anders\)"):
        compare_runs(plain, evaluated(tmp_path / "text", GOOD, [REFERENCES[0], "anders", *REFERENCES[2:]]), "test")
    with pytest.raises(InputError, match=r"absent holds no metrics\.json"):
        compare_runs(plain, tmp_path / "absent", "test")
    (tmp_path / "half/metrics.json").write_text("{}")
    with pytest.raises(InputError, match="evaluate the run again"):
        compare_runs(tmp_path / "half", plain, "test")
