"""Greedy tokens of vLLM in a process of its own: `python tests/vllm_greedy.py MODEL`, JSON in and out.

Reads {"prompts": [[int]], "num_tokens": int} from the standard input; the last line written is [[int]].
"""

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.load(sys.stdin)
    llm = LLM(
        model=sys.argv[1],
        dtype="float32",
        max_model_len=512,
        max_num_seqs=32,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    params = SamplingParams(temperature=0.0, max_tokens=request["num_tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main()
