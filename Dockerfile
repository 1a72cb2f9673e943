# blt-edge on CPUs (x86-64 and aarch64): ONNX Runtime and the server, no compiler, no torch, no model.
#
#   docker build -t blt-edge .
#   docker run --rm --read-only -p 127.0.0.1:8080:8080 -v "$PWD/demo-bundle:/bundle:ro" blt-edge
#
# docs/serve.md has limits, keys and a compose file. Any base with Python 3.10 or newer as python3, its venv and
# glibc 2.28 or newer does.
ARG BASE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE} AS build
# Where it is not given, pip's own settings count, which a build may mount as /etc/pip.conf.
ARG PIP_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
COPY . .
RUN python3 -m venv /build \
    && python3 -m venv --without-pip /opt/blt-edge \
    && /build/bin/pip wheel -q --no-deps --wheel-dir /wheels .
# What has no wheel for this processor is refused: there is no compiler.
RUN /build/bin/pip --python /opt/blt-edge/bin/python install -q --only-binary :all: --no-compile \
        -c constraints.txt "$(echo /wheels/*.whl)[cpu,serve]"
# What a server never opens is left out. Python files are compiled whatever becomes of their times, for nobody can
# write beside them later.
WORKDIR /opt/blt-edge/lib
RUN rm -rf python3*/site-packages/onnxruntime/transformers \
        python3*/site-packages/onnxruntime/quantization \
        python3*/site-packages/onnxruntime/tools \
        python3*/site-packages/blt_edge/export/demo/model.safetensors \
    && find . -path '*/numpy/*' -name tests -type d -prune -exec rm -r {} + \
    && /opt/blt-edge/bin/python -m compileall -q --invalidation-mode unchecked-hash .

FROM ${BASE}
LABEL org.opencontainers.image.title="blt-edge" \
      org.opencontainers.image.description="Server for Byte Latent Transformers on CPUs" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/blt-edge /opt/blt-edge
ENV PATH=/opt/blt-edge/bin:$PATH HOME=/tmp
# The imports leave compiled what they need of Python's own library, which slim images come without. ONNX Runtime
# is not among them: when the other processor is emulated, it may crash on what /sys says of this one.
RUN python3 -c "import http.client, blt_edge.tools.cli.serve, blt_edge.tools.server.run" \
    && blt-edge --version
ENV PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /
EXPOSE 8080
# It does not listen before the model is loaded. http.client heeds no proxy of the environment.
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 CMD ["python3", "-I", "-c", \
    "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8080, 3); c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["blt-edge"]
# Engines kill what has not ended after ten seconds: the grace ends earlier.
CMD ["serve", "-m", "/bundle", "--host", "0.0.0.0", "--grace", "5"]
