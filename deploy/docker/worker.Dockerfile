# A worker; also `midspan serve` and everything else that needs torch.
#   docker build -f deploy/docker/worker.Dockerfile -t midspan-worker .
#   docker build -f deploy/docker/worker.Dockerfile -t midspan-worker:cuda --build-arg TORCH=https://download.pytorch.org/whl/cu128 .
FROM python:3.11-slim AS build
# where torch's builds are: for CPUs, or for one version of CUDA (its libraries come with it)
ARG TORCH=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY . .
RUN python -m venv /opt/midspan
RUN /opt/midspan/bin/pip install --no-cache-dir -c constraints.txt --index-url ${TORCH} torch
RUN /opt/midspan/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.11-slim
COPY --from=build /opt/midspan /opt/midspan
RUN useradd --uid 10001 --no-create-home --home-dir /tmp midspan
USER 10001
ENV HOME=/tmp HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
EXPOSE 8080 9100
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s CMD ["/opt/midspan/bin/python", "-c", "import os, urllib.request as r; r.urlopen(os.environ.get('MIDSPAN_HEALTH', 'http://127.0.0.1:9100/health'), timeout=2)"]
ENTRYPOINT ["/opt/midspan/bin/midspan"]
CMD ["worker", "--broker", "tcp://broker:5556", "--key", "/keys/worker.key_secret", "--broker-key", "/keys/broker.key", "--metrics", "0.0.0.0:9100", "--log-format", "json"]
