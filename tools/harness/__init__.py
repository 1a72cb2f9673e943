"""blt-edge as a model of EleutherAI's lm-evaluation-harness.

    python -m blt_edge.tools.harness --model blt-edge --model_args pretrained=BUNDLE --tasks TASK

is `lm_eval` with that model added: the harness looks for models of other packages nowhere, so somebody has to
import them before it starts.
"""
