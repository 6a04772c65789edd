"""pytest -q paper: about a minute on one core, offline. Two short real runs of the digits serve."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import moodcat
import train_gen
import train_scorer
from evaluate import ood_metrics
from moodcat import MoodCat, joint_scores, load_checkpoint
from paper import (ablate, bench, common, compare, develop, fair, figures, halves, inside,
                   intervene, limits, obedience, scood, scorers, ship, tables)
from train_scorer import load_classifier, predict

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # as in test_moodcat.py: with more threads other nets are trained

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs, known 0 to 3, seeds 0 and 1; and numbers that say they are of a wider net."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in "01":
        run = ["--run", str(folder / f"a-{seed}"), "--seed", seed]
        train_gen.main([*run, "--steps", "12", "--ch", "4", "--known-classes", *"0123"])
        train_scorer.main([*run, "--steps", "20", "--classifier-steps", "40"])
        evaluate.main(run)
    wide = results(folder / "a-0")
    wide["settings"]["generator"]["ch"] = 8
    evaluate.write_json(folder / "wide" / "results.json", wide)
    return folder

def results(run, file="results.json"):
    return json.loads(Path(run, file).read_text())

# --- compare -------------------------------------------------------------------------------------

def test_compare_prints_mean_spread_and_gain(runs, capsys):
    a, b = results(runs / "a-0"), results(runs / "a-1")
    cb = [100 * r["y = C(x)"]["cb"]["unknown"]["auroc"] for r in (a, b)]
    energy = [100 * r["y = C(x)"]["energy"]["unknown"]["auroc"] for r in (a, b)]
    both = [str(runs / name) for name in ("a-0", "a-1")]
    compare.main([*both, "--first", "energy"])
    out = capsys.readouterr().out
    gain = np.subtract(cb, energy)
    assert (f"| cb | {np.mean(cb):.2f} ± {np.std(cb, ddof=1):.2f} "
            f"({gain.mean():+.2f} ± {gain.std(ddof=1):.2f}) |") in out
    assert "2 run(s)" in out and "seed(s) 0, 1" in out
    compare.main([*both, "--against", *both, "--labels", "oracle labels"])
    cb = [100 * r["oracle labels"]["cb"]["unknown"]["fpr95"] for r in (a, b)]
    out = capsys.readouterr().out
    assert f"{np.mean(cb):.2f} ± {np.std(cb, ddof=1):.2f} (+0.00 ± 0.00)" in out
    assert "Settings that differ: none" in out

@pytest.mark.parametrize("part, name, value", [
    ("generator", "ssim", 0.0), ("generator", "steps", 80), ("cb", "ch", 4),
    ("classifier", "smoothing", 0.1), ("cb", "mirror", True)])
def test_compare_refuses_one_other_setting_of_any_part_and_prints_it_across(
        runs, tmp_path, capsys, part, name, value):
    a, b = runs / "a-0", runs / "a-1"
    changed = results(b)
    was = changed["settings"][part][name]
    changed["settings"][part][name] = value
    evaluate.write_json(tmp_path / "results.json", changed)
    line = f"{part} {name}: {{}} against {{}}"
    with pytest.raises(ValueError, match=line.format(value, was)):
        compare.main([str(a), str(tmp_path), str(b)])
    compare.main([str(tmp_path), "--against", str(b)])
    assert f"Settings that differ: {line.format(value, was)}\n" in capsys.readouterr().out

def test_compare_takes_seeds_and_splits_of_one_side_and_no_other_images(runs, tmp_path):
    changed = results(runs / "a-1")
    for part in changed["settings"].values():
        part.update(seed=7, n=1, data="elsewhere", device="cuda", processes=2)
        part.update(classes=list("2345"), known_classes=list("2345"), fingerprint="of these")
    evaluate.write_json(tmp_path / "results.json", changed)
    compare.main([str(runs / "a-0"), str(tmp_path)])
    changed["settings"]["generator"]["classes"] = list("0123")
    evaluate.write_json(tmp_path / "results.json", changed)
    with pytest.raises(ValueError, match="training images"):
        compare.main([str(runs / "a-0"), str(tmp_path)])

def test_compare_refuses_runs_that_no_mean_should_mix(runs, tmp_path, capsys):
    a, b, wide = (str(runs / name) for name in ("a-0", "a-1", "wide"))
    with pytest.raises(ValueError, match="differ in generator ch: 8 against 4"):
        compare.main([a, wide])
    other_set = results(a)
    for rows in other_set["y = C(x)"].values():
        rows["svhn"] = rows["unknown"]
    evaluate.write_json(tmp_path / "results.json", other_set)
    with pytest.raises(ValueError, match="OOD sets"):
        compare.main([a, str(tmp_path)])
    other_set["settings"]["cb"]["seed"] = 5
    evaluate.write_json(tmp_path / "results.json", other_set)
    with pytest.raises(ValueError, match="pairs"):
        compare.main([str(tmp_path), "--against", a])
    with pytest.raises(ValueError, match="pairs"):
        compare.main([a, b, "--against", b, a])
    with pytest.raises(ValueError, match="pairs"):
        compare.main([a, b, "--against", a])
    compare.main([a, "--against", wide])  # other settings on the other side are the point
    assert "Settings that differ: generator ch: 4 against 8\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no method 'x'"):
        compare.main([a, "--first", "x"])
    for name, change in (("one", dict(classifier="1")), ("two", dict(classifier="2")),
                         ("three", dict(classifier="1", calibrate="FOLDER"))):  # programs
        program = dict(results(a), **change)
        program["settings"] = dict(program["settings"], classifier=None)
        evaluate.write_json(tmp_path / name / "results.json", program)
    for name in ("two", "three"):
        with pytest.raises(ValueError, match="classifier: 1 against 2|calibrate: None against FOLDER|"
                                             "classifier: 2 against 1|calibrate: FOLDER against None"):
            compare.main([str(tmp_path / "one"), str(tmp_path / name)])
    evaluate.write_json(tmp_path / "other.json", dict(settings={}))
    with pytest.raises(ValueError, match="does not say how it was scored"):
        compare.main([str(tmp_path), "--file", "other.json"])
    with pytest.raises(OSError, match="evaluate that run"):
        compare.main([str(runs / "none")])

# --- SC-OOD and CIFAR+N --------------------------------------------------------------------------

@pytest.fixture
def benchmark(tmp_path):
    """SC-OOD's layout for 4 classes: 4 OOD images and 2 that show classes 1 and 3."""
    images = train_gen.find_images("digits", "test")[0]
    (tmp_path / "images").mkdir()
    lists = tmp_path / "imglist" / "benchmark_digits"
    lists.mkdir(parents=True)
    lines = []
    for i, label in enumerate([-1, 1, -1, -1, 3, -1]):
        images[i].save(tmp_path / "images" / f"a b {i}.png")
        lines.append(f'a b {i}.png {{"label": -1, "sc_label": {label}}}\n')
    (lists / "test_mixed.txt").write_text("".join(lines))
    return tmp_path

def test_in_distribution_images_of_an_ood_list_join_the_test_images(runs, benchmark):
    out = benchmark / "out"
    scood.main(["--run", str(runs / "a-0"), "--root", str(benchmark), "--out", str(out)])
    lines = [line.split(",") for line in (out / "scores.csv").read_text().splitlines()]
    column = lambda name, title: np.array([line[lines[0].index(title)] for line in lines
                                           if line[:2] == [name, "C(x)"]])
    inside = column("mixed", "truth") != "OOD"
    assert inside.tolist() == [False, True, False, False, True, False]
    for method in ("cb", "min-p"):
        mixed = column("mixed", method).astype(float)
        test = column("in-distribution", method).astype(float)
        want = ood_metrics(np.r_[test, mixed[inside]], mixed[~inside])
        got = results(out)["y = C(x)"][method]["mixed"]
        assert got["auroc"] == pytest.approx(want["auroc"], abs=1e-6)
        assert got["fpr95"] == pytest.approx(want["fpr95"])
    right = np.r_[column("in-distribution", "truth") == column("in-distribution", "y"),
                  (column("mixed", "truth") == column("mixed", "y"))[inside]]
    assert got["accuracy"] == pytest.approx(right.mean())
    assert list(results(out)["y = C(x)"]["cb"]) == ["mixed"]  # no "unknown"

@pytest.mark.parametrize("line, message", [
    ("a b 0.png", "line 1"), ('a b 0.png {"label": 1}', "sc_label"),
    ('a b 0.png {"sc_label": 4}', "not in -1 to 3"), ('a b 0.png {"sc_label": true}', "line 1"),
    ('a b 9.png {"sc_label": -1}', "a b 9.png"), ("", "is empty")])
def test_a_damaged_list_ends_in_one_line(benchmark, line, message):
    settings = dict(classes=list("0123"), channels=1, image_size=16)
    file = benchmark / "imglist" / "benchmark_digits" / "test_mixed.txt"
    file.write_text(line)
    with pytest.raises((ValueError, OSError), match=message):
        scood.read_scood(benchmark, settings)
    file.rename(file.with_name("list.txt"))
    with pytest.raises(OSError, match="for 4 classes"):
        scood.read_scood(benchmark, settings)

def test_lists_of_another_number_of_classes_are_not_taken(benchmark):
    folder = benchmark / "imglist" / "benchmark_digits"
    folder.rename(folder.with_name("benchmark_cifar10"))
    settings = dict(classes=list("0123"), channels=1, image_size=16)
    with pytest.raises(OSError, match="benchmark_cifar4"):
        scood.read_scood(benchmark, settings)
    settings["classes"] = list("0123456789")
    x, labels, names = scood.read_scood(benchmark, settings)["mixed"]
    assert x.shape == (6, 1, 16, 16) and labels.tolist() == [-1, 1, -1, -1, 3, -1]

def test_cifar_plus_is_reproducible_and_holds_animals_alone():
    sets = [scood.animals(f"cifar+10:{i}") for i in range(5)]
    assert sets == [scood.animals(f"cifar+10:{i}") for i in range(5)]
    assert all(len(set(s)) == 10 and set(s) <= set(scood.ANIMALS) for s in sets)
    assert len({tuple(s) for s in sets}) == 5
    assert len(set(scood.animals("cifar+50"))) == 50
    vehicles = "bicycle bus motorcycle pickup_truck train lawn_mower rocket streetcar tank tractor"
    assert not set(scood.ANIMALS) & set(vehicles.split())
    with pytest.raises(ValueError, match="no set"):
        scood.animals("cifar+10:5")

# --- ablations -----------------------------------------------------------------------------------

def test_scores_are_read_as_they_were_written(runs):
    """The tables of results.json follow from scores.csv."""
    scored = common.read_scores(runs / "a-0")
    held_out = [scored.pop(("held-out", labels)) for labels in ("C(x)", "given")]
    assert list(scored) == [(name, labels) for name in ("in-distribution", "unknown")
                            for labels in ("C(x)", "given")]
    for protocol, labels in evaluate.PROTOCOLS.items():
        assert evaluate.tabulate(scored, *labels) == results(runs / "a-0")[protocol]
    n = results(runs / "a-0")["n"]
    assert n == {name: len(scored[name, "C(x)"].truth) for name in n}
    assert torch.equal(held_out[1].y, held_out[1].truth)
    assert held_out[0].truth.unique().tolist() == [0, 1, 2, 3]
    assert (scored["unknown", "given"].truth == -1).all()

def test_a_subset_scores_as_the_detector_of_that_subset(runs):
    scored = common.read_scores(runs / "a-0")
    for s in scored.values():  # a third scorer
        s.scores["third"] = s.scores["MSP"]
    held_out = scored["held-out", "C(x)"].scores
    before = {key: len(s.scores) for key, s in scored.items()}
    ablate.add_subsets(scored, held_out, ["cb", "ssim", "third"])
    assert {key: len(s.scores) - 2 * 4 for key, s in scored.items()} == before
    reference = {name: held_out[name][::2] for name in ("cb", "ssim")}
    for s in scored.values():  # under either kind of labels
        want = joint_scores(s.scores, reference)
        for rule in ("min-p", "fisher"):
            assert torch.equal(s.scores[f"cb+ssim {rule}"], want[rule])
            assert torch.equal(s.scores[f"cb+ssim {rule}"], s.scores[rule])  # as evaluate.py had it
        assert s.scores["cb+third fisher"].isfinite().all()
        assert (s.scores["cb+ssim+third min-p"] <= s.scores["cb+third min-p"] + 1e-6).all()
    assert not torch.equal(scored["unknown", "C(x)"].scores["cb+third min-p"],
                           scored["unknown", "given"].scores["cb+third min-p"])

def test_ablation_agrees_with_the_evaluation_and_averages_masks(runs):
    shutil.copytree(runs / "a-0", runs / "ablated", dirs_exist_ok=True)
    run = str(runs / "ablated")
    ablate.main(["--run", run, "--only", "masks 1", "masks 2", "mask random"])  # in any order
    got, want = results(run, "ablation.json"), results(run)["y = C(x)"]
    assert [title for title in got if title.startswith("mask")] == [
        "mask random", "mask random, oracle labels", "masks 2", "masks 2, oracle labels", "masks 1",
        "masks 1, oracle labels"]
    assert got["masks 1, oracle labels"]["cb"] == results(run)["oracle labels"]["cb"]
    assert got["masks 1"]["cb+energy fisher"] == got["subsets, y = C(x)"]["cb+energy fisher"]
    assert got["masks 1"]["cb"] == want["cb"] and got["mask random"]["min-p"] == want["min-p"]
    assert got["subsets, y = C(x)"]["cb+ssim fisher"] == want["fisher"]
    assert got["masks 2"]["cb"] != want["cb"] and got["masks 2"]["MSP"] == want["MSP"]
    assert got["subsets, y = C(x)"]["cb+ssim+energy fisher"] == want["fisher with energy"]
    before = {k: v for k, v in got.items() if k != "command"}
    ablate.main(["--run", run, "--subsets"])  # no net runs; the rest is kept
    assert {k: v for k, v in results(run, "ablation.json").items() if k != "command"} == before

def test_the_other_mask_styles():
    x = torch.rand(8, 3, 32, 32) * 2 - 1
    x_m, mask = ablate.no_mask(x)
    assert torch.equal(x_m, x) and not mask.any()
    for ratio in (0.1, 0.25, 0.3):
        x_m, mask = ablate.fixed_square(x, ratio=ratio)
        assert torch.equal(mask, mask.flip(2, 3)) and (mask.float().mean() - ratio).abs() < 0.02
        assert (x_m[mask.expand_as(x)] == 0).all() and torch.equal(x_m[~mask.expand_as(x)],
                                                                   x[~mask.expand_as(x)])
    squares = F.avg_pool2d(ablate.random_squares(x, ratio=0.3)[1].float(), 4)
    assert ((squares == 0) | (squares == 1)).all() and (squares.sum((1, 2, 3)) == 19).all()
    x_m, mask = ablate.shuffled_squares(x)
    cut = lambda t: F.unfold(t, 4, stride=4).transpose(1, 2)
    order = torch.cdist(cut(x_m), cut(x)).argmin(2)  # which square went where
    assert not mask.any() and (order.sort(1).values == torch.arange(64)).all()
    assert (order != torch.arange(64)).any() and torch.equal(
        cut(x).gather(1, order[:, :, None].expand(-1, -1, 48)), cut(x_m))
    for f in (ablate.random_squares, ablate.shuffled_squares):
        assert torch.equal(f(x, 1)[0], f(x, 1)[0]) and not torch.equal(f(x, 0)[0], f(x, 1)[0])
        with pytest.raises(ValueError, match="multiples of 4"):
            f(x[:, :, :30])
    for f in ablate.STYLES.values():  # the detector's masks take an image and a number
        x_m, mask = f(x, 0)
        assert x_m.shape == x.shape and mask.shape == (8, 1, 32, 32) and mask.dtype == torch.bool
    shares = {name: f(x, 0)[1].float().mean().item() for name, f in ablate.STYLES.items()}
    assert shares["fixed 0.1"] == pytest.approx(0.1, abs=0.02)
    assert shares["patch 0.3"] == 19 / 64 and 0.25 < shares["random 0.3 to 0.5"] < 0.55

# --- development ---------------------------------------------------------------------------------

def test_development_reads_no_test_image_and_reports_on_the_odd_half(runs, monkeypatch, capsys):
    find, asked = train_gen.find_images, []
    for module in (train_gen, evaluate):
        monkeypatch.setattr(module, "find_images", lambda data, split: (
            asked.append(split), find(data, split))[1])
    run = str(runs / "a-0")
    develop.main([run, "--unknown-classes", "4", "5"])
    assert set(asked) == {"train"}
    got = results(run, "develop.json")
    held_out = common.read_scores(run)["held-out", "C(x)"]
    assert got["n"]["in-distribution"] == len(held_out.truth) // 2
    assert got["settings"] == results(run)["settings"]
    y = find("digits", "train")[1]
    assert got["n"]["unknown"] == np.isin(y, [4, 5]).sum()
    split = train_gen.Split("digits", "train", list("0123"), 16)
    x = split.unknown[develop.unknown_rows("digits", list("0123"), ["4", "5"])]
    classifier, _, _ = load_classifier(run, None, "cpu")
    unknown = predict(classifier, x, 4).logsumexp(1)
    want = ood_metrics(held_out.scores["energy"][1::2], unknown)["auroc"]
    assert got["y = C(x)"]["energy"]["unknown"]["auroc"] == pytest.approx(want, abs=1e-6)
    reference = {name: held_out.scores[name][::2] for name in ("cb", "ssim")}
    fisher = joint_scores(held_out.scores, reference)["fisher"][1::2]
    assert "| fisher with energy |" in capsys.readouterr().out
    trained = evaluate.TrainedRun(evaluate.make_parser("").parse_args(["--run", run]))
    _, scored, _ = common.score_run(trained, {"unknown": (x, torch.full((len(x),), -1), None)})
    want = ood_metrics(fisher, scored["unknown", "C(x)"].scores["fisher"])["auroc"]
    assert got["y = C(x)"]["fisher"]["unknown"]["auroc"] == pytest.approx(want, abs=1e-6)
    monkeypatch.setattr(develop, "MOST", 50)
    rows = develop.unknown_rows("digits", list("0123"), None)
    assert 25 < len(rows) <= 50
    with pytest.raises(ValueError, match="fewer --known-classes"):
        develop.unknown_rows("digits", list("0123"), ["0"])

def test_development_splits_leave_the_reported_digits_alone():
    for known, unknown in develop.SPLITS.values():
        assert sorted(known + unknown) == list("012345")

# --- tables --------------------------------------------------------------------------------------

def test_tables_are_means_over_the_runs_and_go_only_where_told(runs, tmp_path, monkeypatch, capsys):
    later = dict(label="later", runs="b-?", method="cb")
    common_part = dict(note="N.", command="train it", of="method", columns=["auroc"])
    spec = [dict(common_part, title="T", gain=True, rows=[
        dict(label="cb", runs="a-?", method="cb", paper=[90.5]),
        dict(label="ssim", runs="a-?", method="ssim"), later])]
    spec.append(dict(common_part, title="Open", rows=[later]))
    columns = [dict(head=k, runs=f"{k}-?", metric="auroc") for k in "ab"]
    spec.append(dict(common_part, title="Two", columns=columns, rows=[dict(label="cb", method="cb")]))
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    monkeypatch.setattr(tables, "SPEC", tmp_path / "spec.json")
    before = {p: p.read_bytes() for p in (ROOT / "results").glob("*.*")}
    tables.main([str(runs)])
    values = {m: [100 * results(runs / f"a-{i}")["y = C(x)"][m]["unknown"]["auroc"]
                  for i in (0, 1)] for m in ("cb", "ssim")}
    gain = np.subtract(values["ssim"], values["cb"])
    show = lambda v: f"{np.mean(v):.2f} ± {np.std(v, ddof=1):.2f}"
    out = capsys.readouterr().out
    assert f"| cb | 2 | {show(values['cb'])} | 90.50 |" in out
    gain = f"{gain.mean():+.2f} ± {gain.std(ddof=1):.2f}"
    assert f"| ssim | 2 | {show(values['ssim'])} ({gain}) | – |" in out
    assert "Not filled here: later." in out and "**Open**: not filled here. `train it`" in out
    assert {p: p.read_bytes() for p in (ROOT / "results").glob("*.*")} == before
    tables.main([str(runs), "--out", str(tmp_path / "out")])
    written = json.loads((tmp_path / "out" / "tables.json").read_text())
    text = "\n".join(map(tables.render, written["tables"]))
    assert (tmp_path / "out" / "TABLES.md").read_text() == text and text in out
    assert written["tables"][0]["values"] == [[np.round(values[m], 4).tolist()] for m in values]
    assert {file for file, _ in written["runs"]} == {"a-0/results.json", "a-1/results.json"}
    with pytest.raises(OSError, match="none of the runs"):
        tables.main([str(tmp_path)])

    # another machine's runs: its rows join those that are there
    shutil.copytree(runs / "a-0", tmp_path / "more" / "b-0")
    tables.main([str(tmp_path / "more"), "--out", str(tmp_path / "out")])
    after = json.loads((tmp_path / "out" / "tables.json").read_text())
    first, other, _ = after["tables"]
    assert first["rows"][:2] == written["tables"][0]["rows"] and first["open"] == ["later"]
    assert first["values"] == written["tables"][0]["values"]
    assert other["rows"] == [["later", "1", f"{values['cb'][0]:.2f}"]]
    assert [file for file, _ in after["runs"]] == ["a-0/results.json", "a-1/results.json", "b-0/results.json"]
    tables.main([str(tmp_path / "more"), "--out", str(tmp_path / "new")])
    new = json.loads((tmp_path / "new" / "tables.json").read_text())["tables"]
    assert [row[0] for row in new[0]["rows"]] == ["later"] and new[0]["open"] == ["cb", "ssim"]
    assert new[2]["open"] == ["cb"]  # half a row

    # of a row, the cells of the runs that are here are new, the others stay
    for i in (0, 1):
        shutil.copytree(runs / f"a-{i}", tmp_path / "more" / f"a-{i}")
    tables.main([str(tmp_path / "more"), "--out", str(tmp_path / "new")])
    shutil.copytree(runs / "a-1", tmp_path / "third" / "b-0")
    tables.main([str(tmp_path / "third"), "--out", str(tmp_path / "new")])
    two = json.loads((tmp_path / "new" / "tables.json").read_text())["tables"][2]
    assert two["rows"] == [["cb", "2", show(values["cb"]), f"{values['cb'][1]:.2f}"]]
    assert two["values"] == [[np.round(values["cb"], 4).tolist(), [round(values["cb"][1], 4)]]]

def test_a_row_that_was_not_run_has_its_price_until_it_is_and_a_cell_takes_several_sets(tmp_path):
    table = dict(title="T", note="N.", command="C", of="method", columns=["auroc", "fpr95"], rows=[
        dict(label="draws", runs="a-?", method="cb", set="cifar+10:*", paper=["1 ± 1", None]),
        dict(label="dear", runs="b", method="cb", price=3)])
    def write(name, **sets):
        rows = {n: dict(auroc=v, fpr95=1 - v) for n, v in sets.items()}
        evaluate.write_json(tmp_path / name / "results.json",
                            {"y = C(x)": dict(cb=rows), "command": "", "revision": "", "versions": {}})
    (tmp_path / "a-0").mkdir()
    (tmp_path / "b").mkdir()
    write("a-0", **{"cifar+10:0": 0.5, "cifar+10:1": 0.7, "cifar+50": 0.9})
    before = tables.gather(table, tmp_path, {})
    dear = ["dear", "–", "not run, 3 core-hours", "–", "–"]
    assert before["rows"] == [["draws", "2", "60.00 ± 14.14", "40.00 ± 14.14", "1 ± 1"], dear]
    assert before["values"] == [[[50.0, 70.0], [50.0, 30.0]], None] and before["open"] == []
    assert tables.gather(table, tmp_path / "none", {}, before) == before
    write("b", unknown=0.8)
    after = tables.gather(table, tmp_path, {}, before)
    assert after["rows"][1] == ["dear", "1", "80.00", "20.00", "–"]

def test_a_mean_over_sets_is_that_of_the_sets():
    rows = dict(a=dict(auroc=0.5), b=dict(auroc=0.7), c=dict(auroc=0.9))
    assert common.metric_of(rows, "mean", "auroc") == pytest.approx(0.7)
    assert common.metric_of(rows, "c", "auroc") == 0.9

def test_the_list_of_tables_is_well_formed():
    spec = json.loads((ROOT / "results" / "paper.json").read_text())
    for table in spec:
        rows = tables.gather(table, "/nowhere", {})["rows"]
        assert all(row[1] == tables.DASH for row in rows), table["title"]
    text = json.dumps(spec)
    assert "EBO" not in text and "_labels" not in text
    runs = json.loads((ROOT / "results" / "tables.json").read_text())["runs"]
    assert all(tables.named(path, spec) for path, _ in runs), "the runs of a table that is gone"
    assert tables.named("digits/base-1/fair.json", spec)
    assert not tables.named("digits/base-10/fair.json", spec)

def test_committed_tables_and_readme_agree():
    written = json.loads((ROOT / "results" / "tables.json").read_text())["tables"]
    assert (ROOT / "results" / "TABLES.md").read_text() == "\n".join(map(tables.render, written))
    by_title = {table["title"]: table for table in written}
    found = re.findall(r"<!-- (.+?) -->\n((?:\|.*\n)+)", (ROOT / "README.md").read_text())
    if not found:
        pytest.skip("README.md marks no table")
    for title, text in found:  # a row of README must be a row of the table, of some of its columns
        head, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines()]
        shown = [by_title[title]["head"].index(name) for name in head]
        written = [[row[i] for i in shown] for row in by_title[title]["rows"]]
        assert len(rows) > 1 and all(row in written for row in rows), title

# --- cost, pictures, the shipped detector --------------------------------------------------------

def test_bench_counts_what_the_paper_counts(monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0.001)
    lines = bench.lines("cpu", False)
    counts = {name: params for name, (_, params, _) in lines.items()}
    assert counts["E"] == 0.460928 and counts["D"] == 3.821955
    assert counts["E"] + counts["D"] + counts["C_b"] == pytest.approx(counts["inference, batch 1"])
    assert counts["inference, batch 1"] == pytest.approx(4.552, rel=0.01)  # Table 13
    assert counts["VGG16, on input and synthesis"] == pytest.approx(14.715, rel=1e-3)
    assert counts["classifier: ResNet-18"] == pytest.approx(11.174, rel=1e-3)
    n, _, work = lines["inference, batch 1"]
    row = bench.measure(work, n)
    assert row["macs"] == pytest.approx(0.356, rel=0.02) and row["rate"] > 0
    lines = bench.lines("cpu", False, ch=2)
    for name in ("generator step, batch 96", "C_b step, batch 96", "inference, batch 64, 2 masks"):
        lines[name][2]()  # the scripts' own steps take what they are given

def test_pictures_are_written_and_not_too_wide(runs, tmp_path):
    figures.main(["--run", str(runs / "a-0"), "--out", str(tmp_path)])
    assert {p.stem for p in tmp_path.glob("*.png")} == {
        "method", "labels", "masks", "panel", "failures", "histograms", "roc", "curves"}
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            assert 600 <= image.width <= 1000 and np.asarray(image.convert("L")).std() > 10

def test_failures_are_the_most_confident_errors(runs, monkeypatch):
    shown = {}
    monkeypatch.setattr(figures, "panel", lambda detector, classes, sets, n: shown.update(sets))
    args = evaluate.make_parser("").parse_args(["--run", str(runs / "a-0"), "--device", "cpu"])
    figures.draw_failures(args)
    detector, _, images = figures.load(args)
    for (title, (x, y)), known in zip(shown.items(), (True, False)):
        every, labels, _ = images["in-distribution" if known else "OOD"]
        scores = detector.score(every, labels)
        errors = scores[detector.rule][detector.rejects(scores) == known]
        mine = detector.score(x, y)
        assert (detector.rejects(mine) == known).all() and len(x) == min(4, len(errors))
        assert mine[detector.rule].tolist() == pytest.approx(
            errors.sort(descending=not known).values[:4].tolist(), abs=1e-3)
        assert title.endswith("rejected" if known else "accepted")
    monkeypatch.setattr(MoodCat, "rejects", lambda self, scores: torch.isnan(scores["fisher"]))
    monkeypatch.setattr(figures, "load", lambda args: (detector, [], {
        "in-distribution": images["in-distribution"]}))
    with pytest.raises(ValueError, match="no error"):
        figures.draw_failures(args)

def test_the_shipped_detector_judges_as_measured(runs, tmp_path, capsys, monkeypatch):
    out = tmp_path / "small"
    seen, weaknesses = [], evaluate.weaknesses
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "weaknesses", lambda args, *more: (
            seen.append(args.classifier) or weaknesses(args, *more)))
        ship.main(["--run", str(runs / "a-0"), "--out", str(out)])
    assert seen == [None], "its own classifier is taken for one that has seen the held-out images"
    for kind in ("detector", "classifier", "generator"):
        saved = load_checkpoint(out / f"{kind}.pt", kind)
        weights = saved["weights"].values() if kind == "detector" else [saved[kind]]
        assert all(v.dtype == torch.float16 for w in weights for v in w.values()
                   if v.is_floating_point())
    assert sum((out / name).stat().st_size for name in ("detector.pt", "classifier.pt")) < 1_000_000
    classifier, _, classes = load_classifier(out, None, "cpu")
    test = train_gen.Split("digits", "test", classes, 16)
    y = predict(classifier, test.x, 4).argmax(1)
    detector = MoodCat.load(out / "detector.pt", classifier=classifier)
    energy = detector.scorers["energy"](train_gen.to_float(test.x[:9]), None, None)
    assert torch.allclose(energy, predict(classifier, test.x, 4)[:9].logsumexp(1), atol=1e-5)
    rejected = detector.is_ood(train_gen.to_float(test.x), y)
    assert rejected.double().mean().item() == results(out)["flagged"]["in-distribution"]
    pictures = sorted((out / "examples").iterdir())
    assert len(pictures) == 12 and sum(p.name.startswith("unknown") for p in pictures) == 4
    assert all(Image.open(p).size == (16, 16) for p in pictures) and (out / "panel.png").exists()
    capsys.readouterr()
    evaluate.main(["--run", str(out), "--images", str(out / "examples")])
    shown = capsys.readouterr().out
    assert "is newer than the detector" not in shown
    verdicts = {Path(line.split("\t")[0]).stem: line.split("\t")[-1]
                for line in shown.splitlines() if ".png\t" in line}
    assert len(verdicts) == 12
    for name, verdict in verdicts.items():
        if not name.startswith("unknown"):
            ood = rejected[int(name.split("-")[2])]
            assert verdict == ("OOD" if ood else "in-distribution")
    with pytest.raises(ValueError, match="folder of its own"):
        ship.main(["--run", str(runs / "a-0")])

    # another scorer on its generator; and the generator goes on
    fork = shutil.copytree(out, tmp_path / "fork")
    other = ["--run", str(fork), "--classifier", str(out / "classifier.pt")]
    train_scorer.main([*other, "--steps", "2"])
    evaluate.main(other)
    assert results(fork)["settings"]["cb"]["generator"]
    assert load_checkpoint(out / "generator.pt", "generator")["command"].endswith(str(out))
    train_gen.main(["--run", str(fork), "--resume", "--steps", "13"])
    before, after = (load_checkpoint(run / "generator.pt", "generator")
                     for run in (runs / "a-0", fork))
    assert after["step"] == 13 and after["discriminator"].keys() == before["discriminator"].keys()
    name = "decoder.embed.weight"
    near = (after["generator"][name] - before["generator"][name]).abs().max()
    assert 0 < near < 0.01, "it began anew"

def test_an_intervention_tells_what_a_score_looks_at(runs, tmp_path):
    """Images of the value of their label, syntheses of the value of theirs: scores that look at y
    alone, x' alone, at both and at neither."""
    t, w = torch.tensor([0, 1, 2, 3] * 5), torch.tensor([1, 2, 3, 0] * 5)
    flat = lambda y: (y.float() / 10)[:, None, None, None].expand(-1, 1, 16, 16)
    of = lambda image: 10 * image.mean((1, 2, 3))
    detector = SimpleNamespace(
        mask=lambda x, i: (x, None), generator=lambda x_m, y: (flat(y), None, None),
        scorers={"y": lambda x, x_fake, y: -(of(x) - y).abs(),
                 "x'": lambda x, x_fake, y: -(of(x) - of(x_fake)).abs(),
                 "agree": lambda x, x_fake, y: -(of(x_fake) - y).abs(),
                 "neither": lambda x, x_fake, y: of(x)})
    reader = lambda x_fake: F.one_hot(of(x_fake).round().long().clamp(max=2), 4)  # 3 is read as 2
    found = intervene.summary(intervene.look(detector, reader, flat(t), t, w), detector.scorers)
    auroc = {name: list(rows["test"].values()) for name, rows in found["intervention"].items()}
    assert auroc["y"] == pytest.approx([1, 1, 1, 0.5, 0.5], abs=1e-6)
    assert auroc["x'"] == pytest.approx([1, 0.5, 0.5, 1, 1], abs=1e-6)
    assert auroc["agree"] == pytest.approx([0.5, 1, 0, 1, 0], abs=0.01)
    assert auroc["neither"] == pytest.approx([0.5] * 5)
    x_fake = found["synthesis"]["x'"]["test"]
    assert [x_fake["read, right"], x_fake["read, wrong"]] == [0.75, 0.75]
    assert x_fake["l1, right"] == 0 and x_fake["l1, wrong"] == pytest.approx(0.15)

    intervene.main(["--run", str(runs / "a-0"), "--reader", str(runs / "a-1"), "--out", str(tmp_path)])
    other = shutil.copytree(runs / "a-0", tmp_path / "other")
    shutil.copy(runs / "a-1" / "classifier.pt", other)
    with pytest.raises(ValueError, match="another classifier"):
        intervene.main(["--run", str(other)])
    written = results(tmp_path, "intervene.json")
    assert set(written["intervention"]) == {"cb", "ssim"} and written["n"] == 240
    ssim = written["intervention"]["ssim"]["test"]
    assert ssim["y alone, x' right"] == 0.5 and ssim["x' and y"] == ssim["x' alone, y wrong"]

def test_stand_ins_show_what_they_say_and_a_verifier_scores_labels(runs, tmp_path):
    run = shutil.copytree(runs / "a-0", tmp_path / "run")
    G, saved = train_scorer.load_generator(run, "cpu")
    args = evaluate.make_parser("").parse_args(["--run", str(run), "--device", "cpu"])
    data = train_scorer.training_split(args, saved)
    made = limits.stand_ins(G, limits.class_means(data))
    x, y = train_gen.to_float(data.x[:8]), data.y[:8]
    zeros = made["class mean"](x, y)[0][y == 0]
    mean = train_gen.to_float(data.x[~data.held_out & (data.y == 0)]).mean(0)
    assert len(zeros) and torch.allclose(zeros, mean.expand_as(zeros), atol=1e-5)
    assert torch.equal(made["x"](x, y)[0], x)
    assert not made["nothing"](x, y)[0].any() and made["synthesis"] is G
    limits.main(["--run", str(run), "--steps", "2", "--verifier", str(run)])
    rows = results(run, "limits.json")
    assert set(rows["y = C(x)"]) - {"MSP", "ODIN"} == {"energy", *(n + e for n in (
        *(f"C_b on {name}" for name in made), "second classifier", "SSIM to synthesis",
        "SSIM to class mean", "SSIM to x at half its size") for e in ("", ", with energy"))}
    assert rows["y = C(x)"]["SSIM to synthesis"] == results(run)["y = C(x)"]["ssim"]
    again = shutil.copytree(runs / "a-1", tmp_path / "again")  # seed 1: its C_b once more
    evaluate.main(["--run", str(again)])
    limits.main(["--run", str(again), "--on", "synthesis"])
    assert results(again, "limits.json")["y = C(x)"]["C_b on synthesis"] == (
        results(again)["y = C(x)"]["cb"])
    # the classifier's own logit is its largest one, which orders much as its energy does
    assert rows["y = C(x)"]["second classifier"]["unknown"]["auroc"] == pytest.approx(
        rows["y = C(x)"]["energy"]["unknown"]["auroc"], abs=0.05)
    of_run, on_x = (load_checkpoint(run / file, "scorer")["settings"]
                 for file in ("scorer.pt", "limits/x/scorer.pt"))
    assert on_x["mask_ratio"] == 0 and on_x["steps"] == 2
    free = "steps", "mask_ratio", "generator"  # the rest as the run's own C_b
    assert all(on_x[name] == value for name, value in of_run.items() if name not in free)
    assert rows["settings"]["C_b on x"] == on_x and rows["settings"]["cb"] == of_run

def test_another_scorer_on_few_images_without_a_test_image(runs, tmp_path, monkeypatch):
    run = shutil.copytree(runs / "a-0", tmp_path / "run")
    seen = []
    plain = limits.train_scorer
    def watched(args, row, G, data, **more):
        seen.append((row, data, more))
        return plain(args, row, G, data, **more)
    monkeypatch.setattr(limits, "train_scorer", watched)
    argv = ["--run", str(run), "--steps", "2", "--scorer", "compare", "--per-class", "5",
            "--on", "synthesis", "class mean", "--dev", "4", "5"]
    limits.main(argv)
    rows = results(run, "limits-compare-5-dev.json")
    trained = {f"compare on {name}{e}" for name in ("synthesis", "class mean")
               for e in ("", ", with energy")}
    assert trained < set(rows["y = C(x)"])
    whole = train_gen.Split("digits", "train", list("0123"), 16)
    for row, data, more in seen:
        assert row is scorers.ROWS["compare"] and more["per_class"] == 5
        x, y = data.training_images()
        assert y.bincount().tolist() == [5] * 4 and data.n == 20
        assert np.isin(train_gen.image_hashes(x), train_gen.image_hashes(whole.training_images()[0])).all()
        assert torch.equal(data.held_out_images()[0], whole.held_out_images()[0])
        assert len(limits.class_means(data)) == 4
    draws = [train_gen.image_hashes(limits.few(whole, 5, seed).training_images()[0]).tolist()
             for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2], "which images is the seed's"
    limits.main([*argv, "--resume"])  # nothing is trained twice
    assert results(run, "limits-compare-5-dev.json")["y = C(x)"] == rows["y = C(x)"]

def test_the_comparer_compares_and_neither_row_reads_the_label():
    x, other = (torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(i)) * 2 - 1
                for i in (0, 1))
    y, z = torch.zeros(6, dtype=torch.long), torch.arange(6) % 3
    torch.manual_seed(0)
    compare_, blind = (scorers.ROWS[name].net(3, 4, 1).eval() for name in ("compare", "unlabeled"))
    assert torch.equal(compare_(x, other, y), compare_(x, other, z))
    assert torch.equal(blind(x, other, y), blind(x, other, z))
    assert torch.allclose(compare_(x, other, y), compare_(other, x, y), atol=1e-5)
    assert torch.allclose(compare_(x, x, y), torch.ones(6), atol=1e-5)  # distance 0: the bias
    assert (compare_(x, other, y) < compare_(x, x, y)).all()
    assert not torch.allclose(blind(x, other, y), blind(x, x, y), atol=1e-3)

def test_rows_of_paper_scorers_reach_the_scripts(runs, tmp_path, monkeypatch):
    run = shutil.copytree(runs / "a-0", tmp_path / "run")
    monkeypatch.setattr(scorers, "SCORERS", added := dict(scorers.SCORERS))
    for module in (train_scorer, evaluate, moodcat):
        monkeypatch.setattr(module, "SCORERS", added)
    for argv in (["train_scorer", "--scorer", "compare", "--steps", "2"],
                 ["evaluate", "--scorers", "compare", "energy", "--out", str(tmp_path / "out")]):
        monkeypatch.setattr("sys.argv", ["scorers", *argv, "--run", str(run)])
        scorers.main()
    assert "compare" in results(tmp_path / "out")["y = C(x)"]
    assert (run / "compare.pt").exists()
    monkeypatch.setattr("sys.argv", ["scorers", "train"])
    with pytest.raises(ValueError, match="name a script first: train_scorer or evaluate"):
        scorers.main()

def test_halves_are_of_each_class_and_g_knows_one(runs, tmp_path, monkeypatch):
    whole = train_gen.Split("digits", "train", list("0123"), 16)
    parts = [train_gen.image_hashes(halves.half(whole, i).training_images()[0]) for i in (0, 1)]
    together = np.sort(np.r_[parts[0], parts[1]])
    assert together.tolist() == np.sort(train_gen.image_hashes(whole.training_images()[0])).tolist()
    counts = [halves.half(whole, i).training_images()[1].bincount() for i in (0, 1)]
    assert (counts[0] - counts[1]).abs().max() <= 1
    assert torch.equal(halves.half(whole, 1).held_out_images()[0], whole.held_out_images()[0])

    run = shutil.copytree(runs / "a-0", tmp_path / "run")
    shown = []
    plain = train_gen.random_batch
    monkeypatch.setattr(train_gen, "random_batch", lambda x, y, n: (shown.append(x), plain(x, y, n))[1])
    halves.main(["--run", str(run)])
    assert all(np.isin(train_gen.image_hashes(x), parts[0]).all() for x in shown) and shown
    saved = {name: load_checkpoint(run / "halves" / file, kind)["settings"] for name, file, kind in (
        ("G", "generator.pt", "generator"), ("0", "0/scorer.pt", "scorer"),
        ("1", "1/scorer.pt", "scorer"))}
    ours = load_checkpoint(run / "generator.pt", "generator")["settings"]
    assert {k for k in ours if ours[k] != saved["G"][k]} == {"n"}
    assert saved["0"]["generator"] == saved["1"]["generator"] and saved["1"]["half"] == 1
    rows = results(run, "halves.json")["y = C(x)"]
    assert {"C_b, the same images", "C_b, other images, with energy"} < set(rows)
    assert train_gen.Split is halves.Split, "the half stays for others"

def test_scores_in_the_hole_see_the_hole_alone(runs, tmp_path):
    x, x_fake = torch.rand(2, 3, 1, 16, 16) * 1.8 - 0.9
    hole = torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    hole[:, :, 4:8, 2:12] = True
    class Fixed(torch.nn.Module):
        settings = {}
        def forward(self, x_m, y):
            return x_fake, None, None
    made, _, _ = inside.Pasted(Fixed())(x.masked_fill(hole, 0.0), None)
    assert torch.equal(made[hole], x_fake[hole]) and torch.equal(made[~hole], x[~hole])
    mean = (x - x_fake).abs()[:, :, 4:8, 2:12].mean((1, 2, 3))
    assert torch.allclose(inside.l1(x, made, None), -mean, atol=1e-6)
    assert torch.equal(inside.l1(x, x, None), torch.zeros(3))
    run = shutil.copytree(runs / "a-0", tmp_path / "run")
    for dev in ([], ["--dev"]):
        inside.main(["--run", str(run), "--masks", "2", *dev])
        rows = results(run, "inside-dev.json" if dev else "inside.json")["y = C(x)"]
        names = [f"{name} {where}" for name in ("l1", "SSIM", "features")
                 for where in ("everywhere", "in the hole")]
        assert {*names, *(f"{name} with energy" for name in names), "energy"} <= set(rows)
        assert rows["SSIM everywhere"] != rows["SSIM in the hole"] and "min-p" not in rows
    inside.main(["--run", str(run)])
    one = results(run, "inside.json")["y = C(x)"]
    assert one["SSIM everywhere"] == results(run)["y = C(x)"]["ssim"]

def test_obedience_is_the_step_of_train_gen_and_a_term_more(runs, tmp_path, monkeypatch):
    """With both weights 0 the same update but for z's noise; then each term moves G alone, or both."""
    monkeypatch.setattr(train_gen, "SETTINGS", dict(train_gen.SETTINGS))
    monkeypatch.setattr(obedience, "SETTINGS", train_gen.SETTINGS)
    monkeypatch.setattr(train_gen, "train_step", train_gen.train_step)
    run = tmp_path / "run"
    reader = str(runs / "a-0")
    obedience.main(["--run", str(run), "--steps", "2", "--ch", "2", "--known-classes", *"0123",
                    "--auxiliary", "0.5", "--reader", reader])
    saved = load_checkpoint(run / "generator.pt", "generator")
    assert saved["settings"]["mismatched"] == 0.5 and saved["settings"]["reader"] == reader
    assert saved["values"]["loss_other"] > 0
    with pytest.raises(ValueError, match="mismatched 0.5, not 0.1"):
        obedience.main(["--run", str(run), "--mismatched", "0.1", "--resume"])
    monkeypatch.setattr(train_gen, "SETTINGS", {name: row for name, row in train_gen.SETTINGS.items()
                                                if name not in obedience.ROWS})
    with pytest.raises(ValueError, match="mismatched 0.5, not None"):  # without the term
        train_gen.main(["--run", str(run), "--steps", "3", "--resume"])

    x, y = (torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1,
            torch.arange(8) % 4)
    def step(**weights):
        torch.manual_seed(0)
        G, D = moodcat.Generator(4, 2, 16, 1), moodcat.UNetDiscriminator(4, 2, 1)
        s = SimpleNamespace(adv=0.5, l1=2.0, l2=3.0, ssim=5.0, kl=0.1, bf16=False, device="cpu",
                            reader=reader, **weights)
        values = obedience.train_step(G, D, *(train_gen.adam(net, 1e-3, "cpu") for net in (G, D)),
                                      x, x, y, s)
        return values, *(torch.cat([p.detach().flatten() for p in net.parameters()]) for net in (G, D))
    none, G0, D0 = step(mismatched=0.0, auxiliary=0.0)
    assert none["loss_other"] == 0
    for weights, same in ((dict(mismatched=1.0, auxiliary=0.0), False),
                          (dict(mismatched=0.0, auxiliary=1.0), True)):
        values, G1, D1 = step(**weights)
        assert values["loss_other"] > 0.1 and values["loss_g"] == none["loss_g"]
        assert not torch.equal(G0, G1) and torch.equal(D0, D1) == same

def test_pictures_of_digits_are_those_of_the_split(tmp_path):
    ship.main(["--pictures", str(tmp_path), "--split", "train", "--classes", "6", "7"])
    files = train_gen.image_files(tmp_path)
    y = train_gen.find_images("digits", "train")[1]
    assert len(files) == np.isin(y, [6, 7]).sum()
    split = train_gen.Split("digits", "train", list("012345"), 16)
    hashes = train_gen.image_hashes(train_gen.read_images(files, 1, 16))
    assert np.isin(hashes, train_gen.image_hashes(split.unknown)).all()

def test_distances_of_features_against_scikit_learn():
    rng = np.random.default_rng(0)
    train, test = torch.tensor(rng.normal(size=(900, 5))), torch.tensor(rng.normal(size=(40, 5)))
    train[:, 4] = test[:, 4] = 3.0  # a constant feature
    y = torch.arange(900) % 3
    train[:, 0] += 4 * y
    from sklearn.covariance import EmpiricalCovariance
    centred = torch.cat([train[y == c] - train[y == c].mean(0) for c in range(3)]).numpy()
    model = EmpiricalCovariance(assume_centered=True).fit(centred)
    far = np.stack([model.mahalanobis((test - train[y == c].mean(0)).numpy()) for c in range(3)])
    assert -fair.mahalanobis(train, test, y, "shared").numpy() == pytest.approx(-far.min(0), rel=1e-6)
    unit = [F.normalize(t).numpy() for t in (train, test)]
    distances = np.sort(np.linalg.norm(unit[1][:, None] - unit[0][None], axis=2), axis=1)
    assert fair.nearest(train, test).numpy() == pytest.approx(-distances[:, 0], abs=1e-6)
    again = train.repeat(5, 1)  # 4,500 images: the 4th (round half to even), here of five equal
    assert fair.nearest(again, test).numpy() == pytest.approx(-distances[:, 0], abs=1e-6)

def test_gains_are_paired_and_of_auroc():
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 300).astype(float) + 1, rng.integers(0, 9, 200).astype(float)
    truth = np.r_[np.ones(300), np.zeros(200)]
    counts = rng.integers(0, 3, 300), rng.integers(0, 3, 200)
    found = fair.aurocs(a, b, [(np.ones(300), np.ones(200)), counts])
    again = roc_auc_score(truth, np.r_[a, b], sample_weight=np.concatenate(counts))
    assert found == pytest.approx([roc_auc_score(truth, np.r_[a, b]), again])
    inside = dict(energy=a, same=2 * a, noise=rng.normal(size=300), better=a + 2)
    outside = dict(energy=b, same=2 * b, noise=rng.normal(size=200), better=b)
    found = fair.bootstrap(inside, outside)
    assert found["same"] == found["energy"] == dict(gain=0, low=0, high=0), "not paired"
    for method, row in found.items():
        exact = (roc_auc_score(truth, np.r_[inside[method], outside[method]])
                 - roc_auc_score(truth, np.r_[a, b]))
        assert row["gain"] == pytest.approx(exact) and row["low"] <= row["gain"] <= row["high"]
    assert found["noise"]["high"] < 0 < found["better"]["low"]

@pytest.mark.parametrize("dev", [[], ["--dev"], ["--dev", "4", "5"]])
def test_every_method_alone_and_with_energy(runs, tmp_path, capsys, dev):
    run = shutil.copytree(runs / "a-0", tmp_path / "run")
    fair.main(["--run", str(run), *dev])
    file = "fair-dev.json" if dev else "fair.json"
    saved = results(run, file)
    capsys.readouterr()
    compare.main([str(run), "--file", file])
    assert f"| kNN | {100 * saved['y = C(x)']['kNN']['unknown']['auroc']:.2f}" in capsys.readouterr().out
    alone = {"MSP", "ODIN", "cb", "ssim", "Mahalanobis", "kNN", "min-p", "fisher"}
    rows = saved["y = C(x)"]
    subsets = {f"{names} {rule}" for rule in moodcat.RULES
               for names in ("cb+ssim", "cb+energy", "ssim+energy", "cb+ssim+energy")}
    assert rows.keys() == alone | {f"{name} with energy" for name in alone} | {"energy"} | subsets
    assert rows["cb+ssim+energy fisher"] == rows["fisher with energy"]
    split = train_gen.Split("digits", "train", list("0123"), 16)
    if dev:  # the half of the held-out images that made no p-values, and no test image
        labels = train_gen.find_images("digits", "train")[1]
        unknown = labels >= 4 if len(dev) == 1 else (labels == 4) | (labels == 5)
        assert saved["n"] == {"in-distribution": len(split.held_out_images()[1]) // 2,
                              "unknown": unknown.sum()}
        return
    assert rows["cb"] == results(run)["y = C(x)"]["cb"]
    scores = common.read_scores(run)
    held_out = scores["held-out", "C(x)"].scores
    pairs = [scores[name, "C(x)"].scores for name in ("in-distribution", "unknown")]
    reference = {name: held_out[name][::2] for name in ("cb", "energy")}
    joint = [joint_scores(s, reference)["fisher"] for s in pairs]
    assert rows["cb with energy"]["unknown"]["auroc"] == pytest.approx(
        ood_metrics(*joint)["auroc"], abs=1e-4)
    gain = saved["gains"]["cb"]["unknown"]["gain"]
    assert gain == pytest.approx(
        rows["cb"]["unknown"]["auroc"] - rows["energy"]["unknown"]["auroc"], abs=1e-6)
    # the features are what the last layer takes; a program shows none
    classifier, _, _ = load_classifier(run, None, "cpu")
    x = train_gen.to_float(split.x[:9])
    assert torch.allclose(fair.features(classifier, split.x[:9]), classifier[:-1](x).double(), atol=1e-5)
    assert fair.features(lambda x: x, split.x[:9]) is None
    torch.jit.script(classifier).save(str(tmp_path / "own.pt"))
    fair.main(["--run", str(run), "--classifier", str(tmp_path / "own.pt")])
    assert "kNN" not in results(run, "fair.json")["y = C(x)"]
