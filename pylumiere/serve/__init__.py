"""The HTTP service: OpenAI's video API over one engine, with durable jobs and a page. Extra `[serve]`.

    schema.py   what comes in and what goes out, and the one place where seconds become frames
    store.py    jobs in SQLite, results as files; what survives a kill
    jobs.py     takes jobs from the store, runs them on a worker, writes the results
    hub.py      progress and preview frames to whoever listens
    loras.py    the files that requests name
    gate.py     before any route: keys, limits of bodies and rates, headers
    service.py  what the routes do: requests become jobs, jobs become answers
    incoming.py a request's key, fields and files
    failures.py errors as answers
    openapi.py  the document, where FastAPI does not see it
    routes/     the routes, a file per resource
    app.py      all of that as one ASGI application
    server.py   one process: options, engine, uvicorn
    ray_app.py  many processes: the same routes in front of engine replicas (extra `[ray]`)

`docs/serving.md` is the guide.
"""
