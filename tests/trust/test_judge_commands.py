"""``kardia judge probe`` and ``show`` as they are typed."""

import json

import pytest

from kardia_jax.cli import main


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


def test_probe_prints_tables_and_the_same_numbers_as_json(capsys):
    assert main(["judge", "probe", "--repeats", "1", "--json"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert f"is asked about {found['items']} replies in 1 round" in told.err
    assert main(["judge", "probe", "--repeats", "1"]) == 0
    said = capsys.readouterr().out
    everything = found["all_criteria"]
    assert f"{found['items']} replies, asked once" in said
    assert f"{everything['within']:.0%}" in said
    for name, report in found["criteria"].items():
        (line,) = [row for row in said.splitlines() if row.strip().startswith(f"{name} ") and "%" in row]
        assert line.split()[1:] == [
            str(report["marks"]),
            f"{report['within']:.0%}",
            f"{report['error']:.2f}",
            f"{report['bias']:+.2f}",
            f"{report['rank_correlation']:.2f}",
            f"{report['deviation']:.2f}",
            f"{report['top_share']:.0%}",
            f"{report['top_allowed']:.0%}",
        ]
    caught, judged = (sum(pair[place] for pair in found["caught"].values()) for place in (0, 1))
    assert [row.split() for row in said.splitlines()].count(["all", str(caught), str(judged)]) == 1
    assert "test-retest: needs --repeats 2" in said
    assert found["same_again"] is None


def test_probe_is_never_answered_from_a_cache(monkeypatch, capsys):
    from kardia_jax import scoring

    seen = []
    original = scoring.make_grader

    def keep(judge, weights):
        seen.append(judge.cache.path)
        return original(judge, weights)

    monkeypatch.setattr(scoring, "make_grader", keep)
    assert main(["judge", "probe", "--repeats", "1", "--judge.cache.path", "here.sqlite"]) == 0
    assert seen == ["off"]


def test_show_grades_a_file_anew(tmp_path, capsys):
    path = tmp_path / "reply.txt"
    path.write_text("Your sister had no right to sell that bike.")
    told = ["--situation", "My sister sold my bike.", "--said", "She sold my bike.", "--profile", "About: A baker."]
    assert main(["judge", "show", "--text", str(path), *told, "--no-prompt"]) == 0
    said = capsys.readouterr().out
    assert "reply.txt, marked by rules-1" in said
    assert "answers the point" in said
    assert "prompt for a judge" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show"], "one of --run, --item and --text"),
        (["show", "--item", "a", "--text", "b"], "one of --run, --item and --text"),
        (["show", "--item", "old-dog/god"], "old-dog/good-bowl"),
        (["show", "--text", "nowhere.txt"], "nowhere.txt"),
        (["show", "--run", "nowhere"], "wanted the folder of a run"),
        (["probe", "--repeats", "0"], "repeats"),
        (["probe", "--items", "nowhere"], "nowhere"),
        (["probe", "--judge.kind", "remote", "--judge.remote.urls"], "urls"),
    ],
)
def test_mistakes_are_one_message(arguments, said, capsys):
    assert main(["judge", *arguments]) == 2
    told = capsys.readouterr()
    assert said in told.err + told.out
    assert "Traceback" not in told.err
