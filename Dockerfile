# Two images from one file: `server` (no torch) and `worker` (with torch, for the methods that train).
#   docker build --target server -t hone . ; docker build --target worker -t hone-worker .
FROM python:3.11-slim-bookworm AS base
# Text models may name a locale (StringNormalizer); slim images have none.
ARG LOCALES="en_US de_DE es_ES fr_FR it_IT ja_JP pt_BR zh_CN"
RUN apt-get update && apt-get install -y --no-install-recommends locales && rm -rf /var/lib/apt/lists/* \
 && for name in $LOCALES; do echo "$name.UTF-8 UTF-8"; done > /etc/locale.gen && locale-gen
RUN useradd --uid 10001 --home-dir /state --shell /usr/sbin/nologin hone && install -d -o hone -g hone /state /models
ENV PATH=/opt/hone/bin:$PATH

FROM base AS build
RUN python -m venv /opt/hone
WORKDIR /source
COPY pyproject.toml constraints.txt README.md ./
COPY app app
COPY optimizers optimizers
RUN pip install --no-cache-dir --constraint constraints.txt .

FROM build AS build-worker
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)" \
 && pip install --no-cache-dir --constraint constraints.txt '.[optimize]'

# Runs on a read-only root: only /state is written, and /tmp.
FROM base AS runtime
ENV LANG=C.UTF-8 HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 ORT_DISABLE_TELEMETRY=1 \
    HONE_REPOSITORY=/models HONE_STATE=/state HONE_HOST=0.0.0.0 HONE_PORT=8000
USER hone
VOLUME /state
STOPSIGNAL SIGTERM

FROM runtime AS worker
COPY --from=build-worker /opt/hone /opt/hone
CMD ["hone", "worker"]

FROM runtime AS server
COPY --from=build /opt/hone /opt/hone
EXPOSE 8000
# The image has no curl; the package brings its own check. The start period covers the longest load of a model.
HEALTHCHECK --interval=10s --timeout=6s --start-period=10m --retries=3 CMD ["hone", "status", "--health"]
CMD ["hone", "serve"]
