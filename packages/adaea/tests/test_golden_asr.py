"""The recorded rates of asr.json, listed in cases.json under the kind ``scores``."""

import pytest
import torch

from adaea import metrics
from fusion_core.stats import mcnemar


@pytest.mark.golden_files("asr.json")
def test_scores(golden, golden_file):
    records = golden.load(golden_file)["cases"]
    cases = [case for case in golden.settings["cases"] if case["kind"] == "scores"]
    assert cases
    checked = 0
    for case in cases:
        if case["file"] != golden_file:
            continue
        atol = {**golden.settings["tolerances"], **case.get("tolerances", {})}["default"]
        _check(golden, records[case["index"]], atol, case["name"])
        checked += 1
    assert checked == len(records)


def _check(golden, record, atol, name):
    y, clean, adv, other, target = (
        torch.tensor(record[key]) for key in ("y", "clean_pred", "adv_pred", "adv_pred_b", "target")
    )
    found = metrics.score(y, clean, adv, target)
    values = {
        "clean_accuracy": found.clean.value,
        "adv_accuracy": found.adversarial.value,
        "asr_strict": found.strict.value,
        "strict_wilson95": [found.strict.low, found.strict.high],
        "asr_official": found.official.value,
        "asr_fooling": found.fooling.value,
        "targeted_success": found.targeted.value,
    }
    only = metrics.paired_counts(y, clean, adv, other)
    values["mcnemar_exact_p"] = mcnemar(*only)
    for key, value in values.items():
        golden.assert_close(value, record[key], rtol=0, atol=atol, what=f"{name}: {key}")
    success = metrics.strict_success(y, clean, adv)
    assert [int(success.sum()), int((clean == y).sum())] == record["strict_counts"]
    assert list(only) == record["mcnemar_counts_a_only_b_only"]
