"""On one thread, a run whose only flag is --output_dir learns to answer at least a fifth of the held-out rows."""

import json

from tests.processes import train


def test_a_run_with_default_settings_answers_held_out_rows_and_prints_predictions(tmp_path):
    result = train("train", f"--output_dir={tmp_path}", timeout=600)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    matches = [record["eval_exact_match"] for record in records if "eval_exact_match" in record]
    assert matches[0] <= 0.02 and matches[-1] >= 0.2
    assert "'which is larger, 20 or 43?' -> '43' (expected '43')" in result.stdout

    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    answer = model.generate(**tokenizer("what comes after 4934?", return_tensors="pt"), max_new_tokens=8)
    assert tokenizer.decode(answer[0], skip_special_tokens=True) == "4935"
