"""HumanEval: programs from their signature and description, run and scored by pass@k."""
