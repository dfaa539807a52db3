"""Serve a scripted model in a process of its own, for tests that send it signals or take its descriptors away.

python tests/helpers/served_script.py [descriptors]    prints its URL, and answers until a signal
"""

import resource
import sys

from helpers.serving import TOKENIZER, Script
from helpers.shop import script

from minglm.serve import engine_thread
from minglm.serve.app import create_app
from minglm.serve.listener import serve
from minglm.serve.requests import ServedModel

if __name__ == "__main__":
    pause, *descriptors = sys.argv[1:]
    for limit in map(int, descriptors):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    engine = Script(script, pause=float(pause))
    # The end waits for a pass however long it takes, so that a test need not be quick.
    engine_thread.JOIN_SECONDS = max(engine_thread.JOIN_SECONDS, 2 * engine.pause)
    app = create_app(engine, ServedModel(TOKENIZER, "tiny", 200_000))
    serve(app, port=0, ready=lambda url: print(url, flush=True))
