# The daemon from its own wheel, as an ordinary user.
#
#   docker build --tag fwd .
#   docker run --rm --network host fwd                                      the embedded model on 127.0.0.1:8393
#   docker run --rm --network host -v /models:/models:ro fwd /models/NAME   another one
#
# Beyond loopback fwd asks for keys, and a published port is beyond loopback: the container needs a file of key hashes.
#
#   docker run --rm -p 8393:8393 -v ./keys:/keys:ro fwd --http 0.0.0.0:8393 --keys /keys
#
# Or it listens on a socket file in a mounted folder that the user 8393 may write, besides the loopback of its own that
# the health check asks.
#
#   docker run --rm -v ./sockets:/sockets fwd --http 127.0.0.1:8393 --http unix:/sockets/http.sock

FROM python:3.13-slim AS wheel
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt hatchling
COPY . .
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:3.13-slim
COPY --from=wheel /src/constraints.txt /wheels/ /tmp/wheels/
RUN pip install --no-cache-dir --constraint /tmp/wheels/constraints.txt /tmp/wheels/*.whl \
 && rm -r /tmp/wheels \
 && useradd --system --uid 8393 --no-create-home --shell /usr/sbin/nologin fwd \
 && install --directory --owner fwd --group fwd --mode 0750 /run/fwd
USER fwd
ENV RUNTIME_DIRECTORY=/run/fwd PYTHONUNBUFFERED=1
EXPOSE 8393
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD \
  ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8393/live', timeout=2)"]
ENTRYPOINT ["fwd", "serve"]
