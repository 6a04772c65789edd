"""pytest -q paper: about a minute on one core, offline. Two short real runs of the digits serve."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import train_gen
import train_scorer
from evaluate import add_joint, ood_metrics
from moodcat import MoodCat, load_checkpoint
from paper import (ablate, bench, common, compare, develop, figures, limits, scood, ship, tables)
from train_scorer import load_classifier, predict

ROOT = Path(__file__).parents[1]

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs, known 0 to 3, seeds 0 and 1; and numbers that say they are of a wider net."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in "01":
        run = ["--run", str(folder / f"a-{seed}"), "--seed", seed]
        train_gen.main([*run, "--steps", "30", "--ch", "4", "--known-classes", *"0123"])
        train_scorer.main([*run, "--steps", "20", "--classifier-steps", "40"])
        evaluate.main(run)
    wide = results(folder / "a-0")
    wide["settings"]["ch"] = 8
    evaluate.write_json(folder / "wide" / "results.json", wide)
    return folder

def results(run, file="results.json"):
    return json.loads(Path(run, file).read_text())

# --- compare -------------------------------------------------------------------------------------

def test_compare_prints_mean_spread_and_gain(runs, capsys):
    a, b = results(runs / "a-0"), results(runs / "a-1")
    own = [100 * r["predicted_labels"]["cb"]["unknown"]["auroc"] for r in (a, b)]
    energy = [100 * r["predicted_labels"]["EBO"]["unknown"]["auroc"] for r in (a, b)]
    both = [str(runs / name) for name in ("a-0", "a-1")]
    compare.main([*both, "--first", "EBO"])
    out = capsys.readouterr().out
    gain = np.subtract(own, energy)
    assert (f"| cb | {np.mean(own):.2f} ± {np.std(own, ddof=1):.2f} "
            f"({gain.mean():+.2f} ± {gain.std(ddof=1):.2f}) |") in out
    assert "2 run(s)" in out and "seed(s) 0, 1" in out
    compare.main([*both, "--against", *both, "--labels", "oracle_labels"])
    own = [100 * r["oracle_labels"]["cb"]["unknown"]["fpr95"] for r in (a, b)]
    assert (f"{np.mean(own):.2f} ± {np.std(own, ddof=1):.2f} (+0.00 ± 0.00)"
            in capsys.readouterr().out)

def test_compare_refuses_runs_that_no_mean_should_mix(runs):
    a, b, wide = (str(runs / name) for name in ("a-0", "a-1", "wide"))
    with pytest.raises(ValueError, match="differ in ch"):
        compare.main([a, wide])
    with pytest.raises(ValueError, match="pairs"):
        compare.main([a, b, "--against", b, a])
    with pytest.raises(ValueError, match="pairs"):
        compare.main([a, b, "--against", a])
    compare.main([a, "--against", wide])  # other settings on the other side are the point
    with pytest.raises(ValueError, match="no method 'x'"):
        compare.main([a, "--first", "x"])
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
    scored = {}
    for line in (out / "scores.csv").read_text().splitlines():
        scored.setdefault(line.split(",")[0], []).append(line.split(","))
    head = scored["set"][0]
    own = lambda s, column: np.array([line[head.index(column)] for line in scored[s]])
    inside = own("mixed", "label") != "OOD"
    assert inside.tolist() == [False, True, False, False, True, False]
    for column in ("cb", "min-p"):
        mixed, test = (own(s, column).astype(float) for s in ("mixed", "in-distribution"))
        want = ood_metrics(np.r_[test, mixed[inside]], mixed[~inside])
        got = results(out)["predicted_labels"][column]["mixed"]
        assert got["auroc"] == pytest.approx(want["auroc"], abs=1e-6)
        assert got["fpr95"] == pytest.approx(want["fpr95"])
    right = np.r_[own("in-distribution", "label") == own("in-distribution", "prediction"),
                  (own("mixed", "label") == own("mixed", "prediction"))[inside]]
    assert got["accuracy"] == pytest.approx(right.mean())
    assert list(results(out)["predicted_labels"]["cb"]) == ["mixed"]  # no "unknown"

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

def test_a_subset_scores_as_the_detector_of_that_subset(runs):
    scored = common.read_scores(runs / "a-0")
    held = scored.pop("held-out")
    for s in (*scored.values(), held):  # a third scorer
        s["third"], s["oracle third"] = s["EBO"], s["EBO"]
    before = {key: len(s) for key, s in scored.items()}
    ablate.subsets(scored, held, ["cb", "ssim", "third"])
    assert {key: len(s) - 2 * 2 * 4 for key, s in scored.items()} == before
    want = {key: {c: s[c] for c in ("cb", "ssim", "EBO", "oracle cb", "oracle ssim")}
            for key, s in scored.items()}
    add_joint(want, held, ["cb", "ssim"])
    for key, s in scored.items():
        for prefix in ("", "oracle "):
            assert torch.equal(s[f"{prefix}cb+ssim min-p"], want[key][f"{prefix}min-p"])
            assert torch.equal(s[f"{prefix}cb+ssim fisher"], want[key][f"{prefix}fisher"])
            assert s[f"{prefix}cb+third fisher"].isfinite().all()
        assert torch.equal(s["cb+ssim min-p"], s["min-p"])  # as evaluate.py had it
        assert (s["cb+ssim+third min-p"] <= s["cb+third min-p"] + 1e-6).all()

def test_ablation_agrees_with_the_evaluation_and_averages_masks(runs, monkeypatch):
    monkeypatch.setattr(ablate, "STYLES", {"random": ablate.STYLES["random"]})
    monkeypatch.setattr(ablate, "MASKS", (2, 1))
    shutil.copytree(runs / "a-0", runs / "ablated", dirs_exist_ok=True)
    run = str(runs / "ablated")
    ablate.main(["--run", run])
    got, want = results(run, "ablation.json"), results(run)["predicted_labels"]
    assert got["masks 1"]["cb"] == want["cb"] and got["mask random"]["min-p"] == want["min-p"]
    assert got["subsets, predicted_labels"]["cb+ssim fisher"] == want["fisher"]
    assert got["masks 2"]["cb"] != want["cb"] and got["masks 2"]["MSP"] == want["MSP"]
    before = {k: v for k, v in got.items() if k != "about"}
    ablate.main(["--run", run, "--subsets"])  # no net runs; the rest is kept
    assert {k: v for k, v in results(run, "ablation.json").items() if k != "about"} == before

def test_the_other_mask_styles():
    x = torch.rand(8, 3, 32, 32) * 2 - 1
    x_m, mask = ablate.StyledMask("none")(x)
    assert torch.equal(x_m, x) and not mask.any()
    for ratio in (0.1, 0.25, 0.3):
        x_m, mask = ablate.StyledMask("fixed", ratio)(x)
        assert torch.equal(mask, mask.flip(2, 3)) and (mask.float().mean() - ratio).abs() < 0.02
        assert (x_m[mask.expand_as(x)] == 0).all() and torch.equal(x_m[~mask.expand_as(x)],
                                                                   x[~mask.expand_as(x)])
    squares = F.avg_pool2d(ablate.StyledMask("patch", 0.3)(x)[1].float(), 8)
    assert ((squares == 0) | (squares == 1)).all() and (squares.sum((1, 2, 3)) == 5).all()
    x_m, mask = ablate.StyledMask("shuffle")(x)
    cut = lambda t: F.unfold(t, 8, stride=8).transpose(1, 2)
    order = torch.cdist(cut(x_m), cut(x)).argmin(2)  # which square went where
    assert not mask.any() and (order.sort(1).values == torch.arange(16)).all()
    assert (order != torch.arange(16)).any() and torch.equal(
        cut(x).gather(1, order[:, :, None].expand(-1, -1, 192)), cut(x_m))
    for style in ("patch", "shuffle"):
        f = ablate.StyledMask(style)
        assert torch.equal(f(x, 1)[0], f(x, 1)[0]) and not torch.equal(f(x, 0)[0], f(x, 1)[0])
        with pytest.raises(ValueError, match="multiples of 4"):
            f(x[:, :, :30])
    for bad in (("blob",), ("fixed", 1.5)):
        with pytest.raises(ValueError, match="no mask"):
            ablate.StyledMask(*bad)

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
    held = common.read_scores(run)["held-out"]
    assert got["n"]["in-distribution"] == len(held["cb"]) // 2
    y = find("digits", "train")[1]
    assert got["n"]["unknown"] == np.isin(y, [4, 5]).sum()
    split = train_gen.Split("digits", "train", list("0123"), 16)
    x = split.unknown[develop.unknown_rows(results(run)["settings"], ["4", "5"])]
    classifier, _, _ = load_classifier(run, None, "cpu")
    unknown = predict(classifier, x, 4).logsumexp(1)
    want = ood_metrics(held["EBO"][1::2], unknown)["auroc"]
    assert got["predicted_labels"]["EBO"]["unknown"]["auroc"] == pytest.approx(want, abs=1e-6)
    assert "| fisher with energy |" in capsys.readouterr().out
    monkeypatch.setattr(develop, "MOST", 50)
    rows = develop.unknown_rows(results(run)["settings"], None)
    assert 25 < len(rows) <= 50
    with pytest.raises(ValueError, match="fewer --known-classes"):
        develop.unknown_rows(results(run)["settings"], ["0"])

def test_development_splits_leave_the_reported_digits_alone():
    for known, unknown in develop.SPLITS.values():
        assert sorted(known + unknown) == list("012345")

# --- tables --------------------------------------------------------------------------------------

def test_tables_are_means_over_the_runs_and_go_only_where_told(runs, tmp_path, monkeypatch, capsys):
    later = dict(label="later", runs="none", method="cb")
    own = dict(note="N.", command="train it", of="method", columns=["auroc"])
    spec = [dict(own, title="T", gain=True, rows=[
        dict(label="cb", runs="a-?", method="cb", paper=[90.5]),
        dict(label="ssim", runs="a-?", method="ssim"), later])]
    spec.append(dict(own, title="Open", rows=[later]))
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    monkeypatch.setattr(tables, "SPEC", tmp_path / "spec.json")
    before = {p: p.read_bytes() for p in (ROOT / "results").glob("*.*")}
    tables.main([str(runs)])
    values = {m: [100 * results(runs / f"a-{i}")["predicted_labels"][m]["unknown"]["auroc"]
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
    assert {file for file, _ in written["runs"]} == {"a-0/results.json", "a-1/results.json"}
    with pytest.raises(OSError, match="none of the runs"):
        tables.main([str(tmp_path)])

def test_the_list_of_tables_is_well_formed():
    for table in json.loads((ROOT / "results" / "paper.json").read_text()):
        assert tables.gather(table, "/nowhere", {})["rows"] == []

def test_committed_tables_and_readme_agree():
    written = json.loads((ROOT / "results" / "tables.json").read_text())["tables"]
    assert (ROOT / "results" / "TABLES.md").read_text() == "\n".join(map(tables.render, written))
    by_title = {table["title"]: table for table in written}
    found = re.findall(r"<!-- (.+?) -->\n((?:\|.*\n)+)", (ROOT / "README.md").read_text())
    if not found:
        pytest.skip("README.md marks no table")
    for title, text in found:  # a row of README must be a row of the table, of the same columns
        head, _, *rows = text.splitlines()
        lines = common.markdown(by_title[title]["head"], by_title[title]["rows"]).splitlines()
        assert head == lines[0] and set(rows) <= set(lines[2:]), title

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
        "method", "masks", "histograms", "roc", "curves"}
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            assert 600 <= image.width <= 1000 and np.asarray(image.convert("L")).std() > 10

def test_the_shipped_detector_judges_as_measured(runs, tmp_path, capsys):
    out = tmp_path / "small"
    ship.main(["--run", str(runs / "a-0"), "--out", str(out)])
    for name, kind in (("detector.pt", "detector"), ("classifier.pt", "classifier")):
        saved = load_checkpoint(out / name, kind)
        weights = [saved["classifier"]] if kind == "classifier" else [
            net["weights"] for net in saved["nets"].values()]
        assert all(v.dtype == torch.float16 for w in weights for v in w.values()
                   if v.is_floating_point())
    assert sum((out / name).stat().st_size for name in ("detector.pt", "classifier.pt")) < 1_000_000
    classifier, _, classes = load_classifier(out, None, "cpu")
    test = train_gen.Split("digits", "test", classes, 16)
    y = predict(classifier, test.x, 4).argmax(1)
    detector = MoodCat.load(out / "detector.pt", classifier=classifier)
    rejected = detector.is_ood(train_gen.to_float(test.x), y)
    assert rejected.double().mean().item() == results(out)["flagged"]["in-distribution"]
    pictures = sorted((out / "examples").iterdir())
    assert len(pictures) == 12 and sum(p.name.startswith("unknown") for p in pictures) == 4
    assert all(Image.open(p).size == (16, 16) for p in pictures) and (out / "panel.png").exists()
    capsys.readouterr()
    evaluate.main(["--run", str(out), "--images", str(out / "examples")])
    verdicts = {Path(line.split("\t")[0]).stem: line.split("\t")[-1]
                for line in capsys.readouterr().out.splitlines() if ".png\t" in line}
    assert len(verdicts) == 12
    for name, verdict in verdicts.items():
        if not name.startswith("unknown"):
            ood = rejected[int(name.split("-")[2])]
            assert verdict == ("OOD" if ood else "in-distribution")
    with pytest.raises(ValueError, match="folder of its own"):
        ship.main(["--run", str(runs / "a-0")])

def test_stand_ins_show_what_they_say_and_a_verifier_scores_labels(runs, tmp_path):
    run = shutil.copytree(runs / "a-0", tmp_path / "run")
    G, about, train = train_scorer.load_run(common.run_parser("").parse_args(["--run", str(run)]))
    made = limits.stand_ins(G, train, about["settings"])
    x, y = train_gen.to_float(train.x[:8]), train.y[:8]
    zeros = made["class mean"][0](x, y)[0][y == 0]
    own = train_gen.to_float(train.x[~train.held & (train.y == 0)]).mean(0)
    assert torch.allclose(zeros, own.expand_as(zeros), atol=1e-5)
    assert torch.equal(made["x"][0](x, y)[0], x) and made["x"][1] == 0
    assert not made["nothing"][0](x, y)[0].any() and made["synthesis"][0] is G
    limits.main(["--run", str(run), "--steps", "2", "--verifier", str(run)])
    rows = results(run, "limits.json")
    assert set(rows["predicted_labels"]) == {"EBO", *(n + e for n in (
        *(f"C_b on {name}" for name in made), "second classifier", "SSIM to synthesis",
        "SSIM to class mean", "SSIM to x at half its size") for e in ("", ", with energy"))}
    assert rows["predicted_labels"]["SSIM to synthesis"] == results(run)["predicted_labels"]["ssim"]
    # the classifier's own logit is its largest one, which orders much as its energy does
    assert rows["predicted_labels"]["second classifier"]["unknown"]["auroc"] == pytest.approx(
        rows["predicted_labels"]["EBO"]["unknown"]["auroc"], abs=0.05)
    assert load_checkpoint(run / "limits/x/scorer.pt", "scorer")["settings"]["mask_ratio"] == 0

def test_pictures_of_digits_are_those_of_the_split(tmp_path):
    ship.main(["--pictures", str(tmp_path), "--split", "train", "--classes", "6", "7"])
    files = train_gen.image_files(tmp_path)
    y = train_gen.find_images("digits", "train")[1]
    assert len(files) == np.isin(y, [6, 7]).sum()
    split = train_gen.Split("digits", "train", list("012345"), 16)
    hashes = train_gen.image_hashes(train_gen.read_images(files, 1, 16))
    assert np.isin(hashes, train_gen.image_hashes(split.unknown)).all()
