"""test_report.py - the arithmetic of bench/report, and its quick run from end to end on a random model.

The run needs the program: $KVFOLD_PROGRAM names it (ctest does); without it that part says SKIP.

SPDX-License-Identifier: Apache-2.0
"""
import glob
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import unittest

ROOT = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
REPORT = os.path.join(ROOT, "bench", "report")
sys.dont_write_bytecode = True
sys.path.insert(0, REPORT)
sys.path.insert(0, os.path.join(ROOT, "bench", "video"))
import chapters  # noqa: E402
import compare  # noqa: E402
import engines  # noqa: E402
import figures  # noqa: E402
import measure  # noqa: E402
import minilm  # noqa: E402
import others  # noqa: E402
import page  # noqa: E402
import plots  # noqa: E402
import rag  # noqa: E402
import readme  # noqa: E402
import scale  # noqa: E402
import sheets  # noqa: E402
import stats  # noqa: E402
import tasks  # noqa: E402
import program  # noqa: E402


def answer(engine, ident, score, first_s=1.0, **more):
    row = {"kind": "answer", "model": "m", "engine": engine, "id": ident, "part": "tasks", "task": "t", "group": "g", "score": score,
           "n_tokens": 4000, "length": None, "depth": None, "first_s": first_s, "n_computed": 10, "n_kept": 10,
           "prediction": "x", "load": 0.0, "date": "2026-01-01T00:00:00", "commit": "c"}
    return dict(row, **more)


def cost(engine, n_tokens, round_, first_s):
    return {"kind": "cost", "model": "m", "engine": engine, "id": "cost-%d" % n_tokens, "n_tokens": n_tokens,
            "round": round_, "first_s": first_s, "second_s": 0.1, "restart_s": first_s + 1, "load": 0.0,
            "date": "2026-01-01T00:00:00", "commit": "c"}


class Statistics(unittest.TestCase):
    def test_no_ratio_from_fewer_than_three_pairs(self):
        self.assertIsNone(stats.ratio([(1.0, 2.0), (1.0, 2.0)]))
        self.assertIsNone(stats.ratio([(1.0, 2.0), (1.0, 2.0), (1.0, 0.0), (None, 1.0)]))

    def test_a_ratio_is_the_median_of_the_pairs_ratios(self):
        self.assertEqual(stats.ratio([(1.0, 2.0), (9.0, 1.0), (3.0, 3.0)]), (1.0, 0.5, 9.0, 3))

    def test_the_interval_holds_the_mean_and_narrows_with_more_items(self):
        few, many = [0.0, 1.0] * 5, [0.0, 1.0] * 200
        mean, low, high = stats.mean_interval(few)
        self.assertTrue(low < mean < high)
        self.assertLess(stats.mean_interval(many)[2] - stats.mean_interval(many)[1], (high - low) / 3)

    def test_the_interval_covers_the_truth_about_19_times_of_20(self):
        import random
        rng, hits = random.Random(7), 0
        for _ in range(200):
            _, low, high = stats.mean_interval([float(rng.random() < 0.4) for _ in range(60)])
            hits += low <= 0.4 <= high
        self.assertTrue(178 <= hits <= 200, hits)

    def test_the_same_items_give_the_same_interval(self):
        values = [0.1, 0.4, 0.9, 0.3]
        self.assertEqual(stats.mean_interval(values), stats.mean_interval(values))

    def test_empty_input_has_no_figure(self):
        self.assertIsNone(stats.mean_interval([]))
        self.assertIsNone(stats.spread([]))
        self.assertIsNone(stats.share_interval([]))
        self.assertIsNone(stats.power_fit([]))

    def test_a_share_of_nothing_is_no_figure(self):
        self.assertIsNone(stats.share_interval([(0.5, 0.0)] * 4))

    def test_a_share_is_of_sums_and_paired(self):
        self.assertAlmostEqual(stats.share_interval([(1.0, 1.0), (0.0, 1.0), (1.0, 2.0), (2.0, 0.0)])[0], 1.0)

    def test_a_power_law_is_found_again(self):
        fit = stats.power_fit([(n, 3e-6 * n ** 1.7) for n in (1024, 4096, 16384, 65536)])
        self.assertAlmostEqual(fit.exponent, 1.7, places=9)
        self.assertAlmostEqual(fit.at(1 << 20) / (3e-6 * (1 << 20) ** 1.7), 1.0, places=9)
        self.assertAlmostEqual(fit.error, 0.0, places=6)

    def test_a_fixed_cost_and_a_cost_a_token_are_found_again(self):
        line = stats.line_fit([(n, 0.25 + 1e-3 * n) for n in (16, 256, 65536, 1 << 20)])
        self.assertAlmostEqual(line.base, 0.25, places=9)
        self.assertAlmostEqual(line.slope, 1e-3, places=12)
        self.assertAlmostEqual(line.error, 0.0, places=9)

    def test_neither_part_of_a_line_is_negative(self):
        rising, falling = ((stats.line_fit([(n, v) for n, v in zip((1, 2, 4), y)])) for y in ((1, 3, 9), (9, 3, 1)))
        self.assertEqual(rising.base, 0.0)
        self.assertEqual(falling.slope, 0.0)
        self.assertGreater(rising.slope, 1.0)
        self.assertTrue(1.0 < falling.base < 9.0)
        self.assertIsNone(stats.line_fit([(1, 1.0), (2, 2.0)]))

    def test_two_lengths_make_no_law(self):
        self.assertIsNone(stats.power_fit([(1, 1.0), (2, 2.0), (2, 2.1)]))

    def test_the_front_has_what_nothing_beats(self):
        points = [("a", 1.0, 0.5), ("b", 2.0, 0.9), ("worse", 2.0, 0.5), ("c", 0.5, 0.1), ("same as a", 1.0, 0.5)]
        self.assertEqual(stats.pareto(points), ["a", "b", "c", "same as a"])

    def test_touching_intervals_are_noise(self):
        self.assertIsNone(stats.moved((1.0, 0.9, 1.1), (1.2, 1.1, 1.3), "high"))
        self.assertEqual(stats.moved((1.0, 0.9, 1.1), (1.3, 1.2, 1.4), "high"), "better")
        self.assertEqual(stats.moved((1.0, 0.9, 1.1), (1.3, 1.2, 1.4), "low"), "worse")
        self.assertIsNone(stats.moved((1.0, 1.0, 1.0), (1.01, 1.01, 1.01), "low", 0.05))


class Figures(unittest.TestCase):
    def test_scores_in_a_column_are_of_the_same_questions(self):
        rows = [answer("full", "q%d" % i, 1.0) for i in range(5)] + [answer("window", "q%d" % i, 0.0) for i in range(1, 4)]
        found = [f for f in figures.quality("m", rows) if f["figure"] == "score" and f["row"] == figures.ALL]
        self.assertEqual([(f["engine"], f["n"], f["value"]) for f in found], [("full", 3, 1.0), ("window", 3, 0.0)])

    def test_texts_within_the_budget_are_left_out(self):
        self.assertEqual(figures.quality("m", [answer("full", "q", 1.0, n_tokens=engines.NEAR_BUDGET)]), [])

    def test_likelihoods_are_held_against_full_on_the_same_texts(self):
        def row(engine, ident, nll, n_tokens=4096):
            return dict(cost(engine, n_tokens, 0, 1.0), kind="likelihood", id=ident, nll=nll)
        rows = [row("full", "a", 2.0), row("full", "b", 3.0, 16384), row("window", "a", 2.5), row("window", "b", 3.0, 16384),
                row("window", "c", 9.0), row("full", "short", 1.0, 1000), row("window", "short", 9.0, 1000)]
        above = {f["row"]: (f["value"], f["n"]) for f in figures.likelihood("m", rows)
                 if f["engine"] == "window" and f["figure"] == "nll above full"}
        self.assertEqual(above, {figures.ALL: (0.25, 2), "below 8K": (0.5, 1), "from 8K on": (0.0, 1)})

    def test_a_likelihood_that_is_lower_for_sure_is_named_with_a_reason(self):
        def row(engine, i, nll):
            return dict(cost(engine, 4096, 0, 1.0), kind="likelihood", id="t%d" % i, nll=nll)
        rows = [row(e, i, 2.0 + 0.1 * i + (0.3 + 0.01 * i if e == "infllm" else 0.0)) for i in range(9) for e in ("full", "infllm", "lazyllm")]
        lines = chapters.worse(scale.everything(rows))[1][2]
        self.assertEqual({tuple(line[:3]) for line in lines}, {("infllm", "full", "nll")})
        self.assertFalse([line for line in lines if "no reason" in line[4]])

    def test_pieces_of_books_go_on_where_they_end(self):
        found = tasks.cut_from_books(None, 3, lambda text: len(text) // 4)
        self.assertEqual(len({f[1] for f in found}), 3)
        _, books = tasks.contexts.find_books(None)
        whole = "\n\n".join(t for _, t in sorted(books))
        for _, piece, after, n in found:
            self.assertIn(piece + after, whole)
            self.assertTrue(n > 3000 and len(after) > 800)

    def test_a_failed_row_is_no_score(self):
        rows = [answer("full", "q", 1.0)]
        del rows[0]["score"]
        found = scale.everything([dict(rows[0], error="e")])
        self.assertEqual([f["section"] for f in found], ["run"])

    def test_ratios_need_three_common_rounds(self):
        rows = [cost("full", 1024, i, 2.0) for i in range(3)] + [cost("window", 1024, i, 1.0) for i in (0, 1)]
        self.assertFalse([f for f in figures.cost("m", rows) if f["section"] == "ratio"])
        rows.append(cost("window", 1024, 2, 1.0))
        found = [f for f in figures.cost("m", rows) if f["figure"] == "first_s / full"]
        self.assertEqual([(f["engine"], f["value"], f["n"]) for f in found], [("window", 0.5, 3)])

    def test_what_ran_hours_apart_is_no_ratio_of_times(self):
        def rows(date):
            return [cost("full", 1024, i, 2.0) for i in range(3)] + [dict(cost("window", 1024, i, 1.0), date=date) for i in range(3)]
        for date, n in (("2026-01-01T00:20:00", 1), ("2026-01-01T02:00:00", 0)):
            found = [f for f in figures.cost("m", rows(date)) if f["figure"] == "first_s / full"]
            self.assertEqual(len(found), n, date)

    def test_figures_come_back_from_their_file(self):
        found = scale.everything([dict(cost("full", n, i, n * 1e-3), read_tps=1e3) for n in (1024, 2048, 4096) for i in range(3)])
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "figures.csv")
            figures.write_csv(path, found)
            again = figures.read_csv(path)
        self.assertEqual(len(again), len(found))
        self.assertEqual([f["n"] for f in again], [f["n"] for f in found])
        self.assertTrue(math.isclose(next(f["value"] for f in again if f["figure"] == "exponent"), 1.0, rel_tol=1e-5))

    def test_where_ours_loses_is_found_and_where_it_wins_is_not(self):
        rows = [cost("infllm", 1024, i, 3.0 + 0.1 * i) for i in range(3)] + [cost("full", 1024, i, 1.0) for i in range(3)]
        pairs = [(f["engine"], o["engine"], f["figure"]) for f, o in figures.worse(scale.everything(rows))]
        self.assertIn(("infllm", "full", "first_s"), pairs)
        self.assertNotIn(("full", "infllm", "first_s"), pairs)


    def test_a_lower_score_is_a_loss_where_the_pairs_say_so(self):
        rows = [answer(e, "q%d" % i, float(e == "full" or i < 2)) for e in ("full", "infllm") for i in range(9)]
        found = scale.everything(rows)
        self.assertIn(("infllm", "full"), [(f["engine"], o["engine"]) for f, o in figures.worse(found)])
        wins = [f["value"] for f in found if f["figure"] == "losses against full" and f["row"] == figures.ALL]
        self.assertEqual(wins, [7])


class Scale(unittest.TestCase):
    def source(self, values):
        rows = [{"model": "m", "policy": "infllm", "what": "read", "tokens": str(n), "unit": "tokens/s", "value": str(v)}
                for n, v in values]
        source = others.Source(os.path.join(others.RESULTS, "speed_long", "x.csv"), rows)
        source.figures = others.speed_long("speed_long/x.csv", rows)
        return source

    def rows(self, lengths):
        return [dict(cost("infllm", n, i, n * 1e-3), read_tps=1000.0) for n in lengths for i in range(3)]

    def test_longer_runs_carry_the_law_and_short_texts_of_another_budget_do_not(self):
        points = scale.points(self.rows([1024, 8192]), [self.source([(1 << 18, 500.0), (1 << 20, 250.0)])], "m", "infllm", "read_s")
        self.assertEqual(points, [(8192, 8.192), (1 << 18, (1 << 18) / 500), (1 << 20, (1 << 20) / 250)])

    def test_what_is_measured_at_1m_is_not_extrapolated(self):
        found = scale.everything(self.rows([8192]), [self.source([(1 << 18, 500.0), (1 << 20, 250.0)])])
        names = {f["figure"] for f in found if f["section"] == "fit" and f["row"] == "read_s"}
        self.assertFalse([n for n in names if n.startswith("at 1048576,")])
        self.assertTrue([n for n in names if n.startswith("at 10485760,")])

    def test_texts_below_8k_alone_are_not_carried_on(self):
        found = scale.everything(self.rows([512, 1024, 4096]))
        self.assertTrue([f for f in found if f["section"] == "fit"])
        self.assertFalse([f for f in found if f["figure"].startswith("at ")])

    def test_readers_are_shown_by_their_worst_round(self):
        rows = [dict(cost("infllm", 4096, i, 1.0), kind="readers", n_readers=4, slowest_s=2.0, all_tps=9.0, same=1.0 - 0.25 * (i == 1),
                     correct=1.0) for i in range(3)]
        block = scale.reader_table(scale.everything(rows), "m")[-1]
        self.assertEqual(block[2][0][:3] + block[2][0][-2:], ["4K", 4, 3, "75 %", "100 %"])


class Plan(unittest.TestCase):
    def test_a_smaller_sample_is_spread_over_all(self):
        self.assertEqual(tasks.evenly(list(range(100)), 4), [12, 37, 62, 87])
        self.assertEqual(tasks.evenly([1, 2], 5), [1, 2])

    def test_short_of_time_the_longest_texts_go_first(self):
        spent = {512: 60.0, 1024: 80.0, 2048: 100.0}
        self.assertEqual(measure.lengths_in_time(spent, 2, 1000.0), [512, 1024, 2048])
        self.assertEqual(measure.lengths_in_time(spent, 2, 300.0), [512, 1024])
        self.assertEqual(measure.lengths_in_time(spent, 2, 1.0), [512])

    def test_engines_begin_one_further_each_time(self):
        bench = measure.Bench.__new__(measure.Bench)
        bench.turn = 0
        names = ["a", "b", "c"]
        self.assertEqual([bench.in_turn(names)[0] for _ in range(4)], ["b", "c", "a", "b"])
        self.assertEqual(bench.in_turn([]), [])

    def test_what_drops_tokens_reads_the_same_budget(self):
        for n_tokens in (4000, 20000):
            for name in engines.NAMES:
                read = engines.kept(name, n_tokens, n_tokens)
                spec = engines.policy(name, n_tokens) if name in engines.POLICIES else ""
                numbers = {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", spec)}
                if spec.startswith("window"):
                    self.assertEqual(numbers["sink"] + numbers["window"], read)
                elif "budget" in numbers:
                    self.assertEqual(numbers["budget"], read)
                elif spec.startswith("infllm:init"):
                    self.assertEqual(numbers["init"] + numbers["window"] + numbers["block"] * numbers["topk"], read)

    def test_a_row_of_other_settings_is_run_again_and_not_shown(self):
        with tempfile.TemporaryDirectory() as folder:
            rows = measure.Rows(os.path.join(folder, "rows.jsonl"))
            for engine, spec, when in (("a", "k=1", "1"), ("a", "k=2", "2"), ("b", None, "1"), ("c", "k=1", "1")):
                row = answer(engine, "q" + when, 1.0, date="2026-01-0%sT00:00:00" % when)
                rows.add(dict(row, spec=spec) if spec else row)
            again = measure.Rows(rows.path)
        key = again.key(again.all[0])
        self.assertTrue(again.has(key, "k=1"))
        self.assertFalse(again.has(key, "k=2"))
        self.assertTrue(again.has(again.key(again.all[2]), "whatever"), "a row that names no settings counts")
        left, said = figures.fresh(again.all)
        self.assertEqual([(r["engine"], r.get("spec")) for r in left], [("b", None), ("c", "k=1"), ("a", "k=2")])
        self.assertEqual(len(said), 1)
        self.assertIn("1 rows of `a`", said[0])

    def test_of_one_case_the_newest_row_counts(self):
        rows = [answer("a", "q", 0.0, date="2026-01-02"), answer("a", "q", 1.0, date="2026-01-03"), answer("a", "q", 0.5, date="2026-01-01")]
        self.assertEqual([r["score"] for r in figures.fresh(rows)[0]], [1.0])

    def test_rows_come_back_and_are_not_run_again(self):
        with tempfile.TemporaryDirectory() as folder:
            rows = measure.Rows(os.path.join(folder, "rows.jsonl"))
            rows.add(answer("full", "q", 1.0))
            again = measure.Rows(rows.path)
        self.assertEqual(again.done, rows.done)
        self.assertEqual(again.all, rows.all)


class Compare(unittest.TestCase):
    def test_two_questions_are_no_evidence(self):
        def report(n, score):
            return scale.everything([answer("full", "q%d" % i, score) for i in range(n)])
        self.assertEqual(compare.moved(report(2, 1.0), report(2, 0.0), 0.05, 0.1), ([], 0))
        found, _ = compare.moved(report(9, 1.0), report(9, 0.0), 0.05, 0.1)
        self.assertIn(("worse", "score"), [(way, f["figure"]) for way, _, f in found])

    def figures_of(self, seconds):
        return scale.everything([cost("full", 1024, i, seconds + 0.01 * i) for i in range(3)])

    def test_a_report_has_not_moved_from_itself(self):
        found, n = compare.moved(self.figures_of(1.0), self.figures_of(1.0), 0.05, 0.1)
        self.assertEqual(found, [])
        self.assertGreater(n, 0)

    def test_twice_the_time_is_worse_and_half_is_better(self):
        found, _ = compare.moved(self.figures_of(1.0), self.figures_of(2.0), 0.05, 0.1)
        self.assertIn(("worse", "first_s"), [(way, f["figure"]) for way, _, f in found])
        found, _ = compare.moved(self.figures_of(2.0), self.figures_of(1.0), 0.05, 0.1)
        self.assertEqual({way for way, _, _ in found}, {"better"})

    def test_a_slower_hour_is_no_change_where_ratios_stand(self):
        def report(factor):
            rows = [cost(e, 1024, i, t * factor + 0.01 * i) for e, t in (("full", 2.0), ("window", 1.0)) for i in range(3)]
            return scale.everything(rows)
        found, _ = compare.moved(report(1.0), report(1.5), 0.05, 0.1)
        self.assertNotIn(("window", "first_s"), [(f["engine"], f["figure"]) for _, _, f in found])


class Retrieval(unittest.TestCase):
    def test_escapes_of_tokens_become_their_bytes(self):
        self.assertEqual(rag.unescape(r".\n\n"), b".\n\n")
        self.assertEqual(rag.unescape(r"a\\n\tb\xe2\x82"), b"a\\n\tb\xe2\x82")
        self.assertEqual(rag.unescape(""), b"")

    def test_passages_cover_all_tokens_once_and_end_with_sentences(self):
        tokens = ([b" word"] * 19 + [b"."]) * 20
        bounds = rag.passages(tokens, 128, 32)
        self.assertEqual(bounds[0][0], 0)
        self.assertEqual(bounds[-1][1], len(tokens))
        for (_, end), (first, _) in zip(bounds, bounds[1:]):
            self.assertEqual(end, first)
            self.assertEqual(tokens[end - 1], b".")
        self.assertTrue(all(0 < b - a <= 128 for a, b in bounds))

    def test_a_text_without_sentences_is_cut_at_the_limit(self):
        self.assertEqual(rag.passages([b"x"] * 300, 128, 32), [(0, 128), (128, 256), (256, 300)])
        self.assertEqual(rag.passages([], 128, 32), [])

    def test_the_budget_is_filled_to_the_last_token_in_the_texts_order(self):
        bounds = [(0, 100), (100, 200), (200, 300)]
        self.assertEqual(rag.fill(bounds, [0.1, 0.3, 0.2], 150), [(100, 200), (200, 250)])
        self.assertEqual(rag.fill(bounds, [0.3, 0.1, 0.2], 1000), bounds)
        self.assertEqual(rag.fill(bounds, [0, 0, 0], 0), [])

    def test_bm25_finds_the_rare_word_and_prefers_the_shorter_text(self):
        index = rag.Bm25(["the cat and the dog", "the quick fox", "the quick fox and the dog and the cat and the hen"])
        scores = index.scores("quick fox?")
        self.assertEqual(scores[0], 0.0)
        self.assertTrue(scores[1] > scores[2] > 0)
        self.assertEqual(rag.Bm25([]).scores("x"), [])

    def test_bm25_is_the_published_formula(self):
        # Two texts of lengths 1 and 3, average 2; "a" in both (idf log(1 + 0.5 / 2.5)).
        want = math.log(1 + 0.5 / 2.5) * 1 * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 0.5))
        self.assertAlmostEqual(rag.Bm25(["a", "a b c"]).scores("a")[0], want, places=12)

    def test_word_pieces_are_longest_first(self):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("[PAD]\n[UNK]\n[CLS]\n[SEP]\nun\n##aff\n##able\n##a\ncafe\n!\n")
            file.flush()
            pieces = minilm.WordPieces(file.name)
        self.assertEqual(pieces.text("Unaffable caf\u00e9!"), [4, 5, 6, 8, 9])
        self.assertEqual(pieces.text("xyz"), [1])
        self.assertEqual(pieces.text("x" * 101), [1])

    @unittest.skipIf(minilm.why_not(), "SKIP: %s" % minilm.why_not())
    def test_embeddings_are_those_of_the_models_card(self):
        a, b, c = (minilm.model().embed(t)[0] for t in ("That is a happy person", "That is a very happy person",
                                                        "Today is a sunny day"))
        self.assertAlmostEqual(float(a @ b), 0.943, places=3)
        self.assertAlmostEqual(float(a @ c), 0.257, places=3)


class Pictures(unittest.TestCase):
    def test_a_picture_is_well_formed(self):
        import xml.etree.ElementTree as tree
        points = {"full": [(1024, 1.0, 0.9, 1.2), (4096, 5.0, 4.0, 6.0)], "a<b": [(1024, 2.0, 2.0, 2.0)]}
        law = {"full": (points["full"], stats.power_fit([(n, n) for n in (1, 2, 3)]), 1 << 20)}
        for svg in (plots.laws("l", law, "x", "y", 1 << 20), plots.lines("T & t", points, "x", "y"), plots.heat("h", {(0.5, 1024): (0.5, 1)}, [1024], [0.5]),
                    plots.scatter("s", [("full", 1.0, 0.5, 0.4, 0.6)], "x", "y", ["full"])):
            tree.fromstring(svg)
            self.assertNotIn("nan", svg)

    def test_nothing_to_show_is_no_picture(self):
        self.assertEqual(plots.lines("t", {}, "x", "y"), "")
        self.assertEqual(plots.scatter("t", [], "x", "y", []), "")

    def test_columns_of_names_are_set_apart_from_figures(self):
        html = page.html_block(("table", ["engine", "s"], [["full", "1.0"], ["rag-bm25", ""]]))
        self.assertIn("<td class=name>rag-bm25</td><td></td>", html)
        self.assertIn("<th>s</th>", html)

    def test_a_contact_sheet_is_a_picture_of_planners_by_frames(self):
        import struct
        import zlib
        frame = bytes([200, 100, 50]) * (sheets.WIDE * sheets.HIGH)
        shaded = sheets.shade(frame, {0: 1, 1: 0}, 14)
        self.assertEqual([tuple(shaded[0][3 * x:3 * x + 3]) for x in (0, 8, 16)], [(200, 100, 50), (120, 110, 140), (40, 20, 10)])
        rows = sheets.sheet([[shaded, shaded], [shaded, shaded]])
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "x.png")
            sheets.png(path, rows, len(rows[0]) // 3)
            with open(path, "rb") as file:
                data = file.read()
        self.assertEqual(struct.unpack(">II", data[16:24]), (2 * sheets.WIDE + sheets.GAP, 2 * sheets.HIGH + sheets.GAP))
        n, = struct.unpack(">I", data[33:37])
        self.assertEqual(len(zlib.decompress(data[41:41 + n])), (len(rows[0]) + 1) * len(rows))

    def test_text_cannot_become_markup(self):
        self.assertIn("&lt;script&gt;", page.html_block(("p", "<script>")))


class Others(unittest.TestCase):
    def test_medians_and_counts_are_those_of_the_file(self):
        rows = [{"model": "m", "policy": "infllm", "what": "read", "tokens": "16384", "unit": "tokens/s", "value": v}
                for v in ("900", "1000", "950")]
        found = others.speed_long("speed_long/f.csv", rows)
        self.assertEqual([(f["value"], f["low"], f["high"], f["n"], f["better"]) for f in found], [(950, 900, 1000, 3, "high")])

    def test_a_ratio_to_llama_is_the_median_of_its_pairs_and_needs_three(self):
        row = {"model": "m", "case": "pp512", "kvfold_all": "10 90 80", "llama_all": "10 10 10"}
        ratio = [f for f in others.vs_llamacpp("f", [row]) if f["unit"] == "x"]
        self.assertEqual([(f["value"], f["low"], f["high"], f["n"]) for f in ratio], [(8.0, 1.0, 9.0, 3)])
        row.update(kvfold_all="10 90", llama_all="10 10")
        self.assertFalse([f for f in others.vs_llamacpp("f", [row]) if f["unit"] == "x"])

    def test_a_difference_to_dense_is_of_the_same_questions(self):
        def row(variant, ident, score):
            return {"model": "m", "group": "g", "variant": variant, "id": ident, "score": score, "read_share": 0.5, "ttft_ms": 10.0,
                    "total_ms": 20.0}
        rows = [row("dense", "a", 1.0), row("dense", "b", 0.0), row("fast", "b", 1.0), row("fast", "c", 0.0)]
        less = [f for f in others.lazyllm("f", rows) if f["figure"] == "score less dense"]
        self.assertEqual([(f["value"], f["n"]) for f in less], [(1.0, 1)])

    def test_rows_of_settings_that_are_gone_are_left_out_and_named(self):
        rows = [{"engine": "lazyllm", "commit": c} for c in ("65c9cf6", "ffffff0")] + [{"engine": "full", "commit": "65c9cf6"}]
        left, said = others.without_stale("intel-xeon/rows.jsonl", rows, others.engine_of)
        self.assertEqual([(r["engine"], r["commit"]) for r in left], [("lazyllm", "ffffff0"), ("full", "65c9cf6")])
        self.assertIn("1 rows of `lazyllm` left out", said[0])

    def test_each_note_is_about_a_file_that_is_there(self):
        for note in others.notes():
            self.assertTrue(glob.glob(os.path.join(others.RESULTS, note["file"])), note["file"])

    def test_every_file_of_results_is_in_the_report_of_readme(self):
        with open(readme.README, encoding="utf-8") as file:
            folder = os.path.join(ROOT, readme.folder_of(file.read()))
        with open(os.path.join(folder, "report.md"), encoding="ascii") as file:
            text = file.read()
        with open(os.path.join(folder, "about.json"), encoding="ascii") as file:
            about = json.load(file)
        for source in others.sources(about):
            self.assertTrue("`bench/results/%s`" % source.name in text, source.name + ": run bench/report/run.py --report")


class Machines(unittest.TestCase):
    def name(self, vendor, family, model, name):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("processor\t: 0\nvendor_id\t: %s\ncpu family\t: %d\nmodel\t\t: %d\nmodel name\t: %s\nflags\t\t: fpu avx2\n\n"
                       "processor\t: 1\nmodel\t\t: 99\nmodel name\t: Other\n" % (vendor, family, model, name))
            file.flush()
            return program.cpu_name(file.name)

    def test_a_name_without_a_number_gets_its_core(self):
        self.assertEqual(self.name("AuthenticAMD", 25, 1, "AMD EPYC"), "AMD EPYC Zen 3")
        self.assertEqual(self.name("AuthenticAMD", 25, 0x11, "AMD EPYC"), "AMD EPYC Zen 4")
        self.assertEqual(self.name("AuthenticAMD", 26, 2, "AMD EPYC"), "AMD EPYC Zen 5")
        self.assertEqual(self.name("AuthenticAMD", 26, 0x90, "AMD EPYC"), "AMD EPYC family 26 model 144")

    def test_other_names_stay(self):
        self.assertEqual(self.name("AuthenticAMD", 25, 1, "AMD EPYC 7763 64-Core Processor"), "AMD EPYC 7763 64-Core Processor")
        self.assertEqual(self.name("GenuineIntel", 6, 143, "Intel(R) Xeon(R) Processor"), "Intel(R) Xeon(R) Processor")

    def test_a_file_is_of_the_machine_with_the_longest_name(self):
        self.assertEqual(others.machine_of("speed_long/2026-12-01-amd-epyc-zen-5-first.jsonl"), "amd-epyc-zen-5")
        self.assertEqual(others.machine_of("speed_long/2026-12-01-unknown-first.jsonl"), "")


class Readme(unittest.TestCase):
    def test_only_the_marked_block_changes(self):
        text = "before\n%s\nold\n%s\nafter\n" % readme.marks("speed")
        begin, end = readme.marks("speed")
        self.assertEqual(readme.replaced(text, "speed", "new"), "before\n%s\nnew\n%s\nafter\n" % (begin, end))

    def test_a_text_without_marks_is_refused(self):
        with self.assertRaises(ValueError):
            readme.replaced("no marks", "speed", "new")

    def test_of_several_files_the_most_values_count_and_then_the_newest(self):
        def f(section, value, n):
            return figures.figure("m-0.5b", "speed_long/" + section, "16384", "infllm", "read", float(value), n, "high", "tokens/s")
        found = [f("a.csv", 1, 2), f("b.csv", 2, 3), f("c.csv", 3, 3), f("d.csv", 4, 1)]
        self.assertIn("| 0.5B | `infllm` | 16K | 3 tokens/s, n 3 |", readme.readme_blocks.store(found, "x"))

    def test_a_measured_number_outside_of_the_blocks_is_found(self):
        block = "%s\nreads 900 tokens/s\n%s\n" % readme.marks("speed")
        for number in ("948 tokens/s", "0.26 s", "146 ms", "590 MB", "8.5x", "58 %", "1.6 times", "7,581.5 s", "40 minutes", "3 GB/s",
                       "60 MB/s", "5 us", "12 percent", "8-fold", "4 points", "3 min"):
            found, _ = readme.unexplained("It has 0.5B in 4-bit, 16K and 128.\n%sIt takes %s here.\n" % (block, number), [])
            self.assertEqual([n for n, _ in found], [number])
        self.assertEqual(readme.unexplained("Qwen2.5, version 1.2, 193 pages, -s, 8 layers, 2 sessions", []), ([], []))

    def test_an_allowed_number_is_allowed_where_it_stands_only(self):
        allowed = [{"text": "model (491 MB)", "why": "w"}]
        self.assertEqual(readme.unexplained("model (491 MB)", allowed), ([], []))
        self.assertEqual(readme.unexplained("peak memory 491 MB", allowed), ([("491 MB", "peak memory 491 MB")], ["model (491 MB)"]))

    def test_each_allowed_number_has_its_reason(self):
        self.assertTrue(all(len(e["why"]) > 10 for e in readme.allowed_numbers()))

    def test_each_block_stands_in_the_readme_and_has_figures(self):
        with open(readme.README, encoding="utf-8") as file:
            text = file.read()
        for name in readme.readme_blocks.BLOCKS:
            self.assertRegex(readme.pattern(name).search(text).group(1), r"\d\.\d")

    def test_each_loss_of_the_committed_report_has_its_reason(self):
        for path in glob.glob(os.path.join(ROOT, "bench", "results", "*", "report.md")):
            with open(path, encoding="ascii") as file:
                self.assertNotIn("no reason written yet", file.read(), path)

    def test_the_readme_is_what_its_report_says(self):
        self.assertEqual(readme.main(["--check"]), 0)


@unittest.skipUnless(os.environ.get("KVFOLD_PROGRAM"), "SKIP: $KVFOLD_PROGRAM does not name the program")
class QuickRun(unittest.TestCase):
    def test_the_quick_run_writes_a_whole_report_and_goes_on_where_it_stopped(self):
        tiny = os.path.join(ROOT, "tests", "data", "tiny", "qwen2.gguf")
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "-B", os.path.join(REPORT, "run.py"), "--quick", "--model", tiny, "--threads", "1",
                       "--kvfold", os.environ["KVFOLD_PROGRAM"], "--engines", "full,window,infllm,lazyllm,rag-bm25",
                       "--out", out]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            with open(os.path.join(out, "rows.jsonl"), encoding="utf-8") as file:
                rows = [json.loads(line) for line in file]
            self.assertFalse([r["error"] for r in rows if "error" in r])
            self.assertEqual({r["engine"] for r in rows}, {"full", "window", "infllm", "lazyllm", "rag-bm25"})
            of_readers = [r for r in rows if r["kind"] == "readers"]
            self.assertEqual(sorted(r["n_readers"] for r in of_readers), [1, 1, 1, 2, 2, 2, 4, 4, 4])
            self.assertEqual({r["same"] for r in of_readers}, {1.0}, "a reader said something else than the lone one")
            for r in of_readers:
                self.assertLessEqual(r.get("pss_bytes", 0), r.get("rss_bytes", 0))
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            with open(os.path.join(out, "rows.jsonl"), encoding="utf-8") as file:
                self.assertEqual(len(file.readlines()), len(rows))
            with open(os.path.join(out, "report.html"), encoding="ascii") as file:
                html = file.read()
            self.assertFalse(re.search(r"(src|href)=\"(?!data:)", html), "the page needs other files")
            self.assertIn("not run", html)
            self.assertIn("random model", html)
            found = figures.read_csv(os.path.join(out, "figures.csv"))
            self.assertTrue([f for f in found if f["section"] == "ratio" and f["n"] >= stats.MIN_PAIRS])
            same = subprocess.run([sys.executable, "-B", os.path.join(REPORT, "compare.py"), out, out], check=False,
                                  stdout=subprocess.DEVNULL)
            self.assertEqual(same.returncode, 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
