"""``kardia judge serve``: one judge over HTTP for many learners, whatever judges behind it.

    worker.py    the judge in a thread and an event loop of its own, so that health and metrics never wait for it
    app.py       the routes: POST /v1/score, GET /v1/rubric, GET /healthz, GET /metrics, GET /openapi.json
    guard.py     who may come in: bearer token, size of the body
    metrics.py   what Prometheus reads
    server.py    address, token, signals

What travels is in ``judge/wire.py``; the client is ``judge/remote.py``.

    $ curl -s localhost:8600/v1/score -H 'Content-Type: application/json' -d '{"requests": [{"profile": "",
        "situation": "I lost my job.", "history": [{"role": "user", "text": "They fired me."}], "reply": "Hm."}]}'
    {"judge": "rules-1", "rubric": {...}, "answers": [{"verdict": {"marks": [{"criterion": "relevance", "mark": 1, ...
"""
