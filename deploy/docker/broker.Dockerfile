# The broker, and every command that needs no torch: status, keys, autoscale.
#   docker build -f deploy/docker/broker.Dockerfile -t midspan-broker .
FROM python:3.11-slim AS build
WORKDIR /src
COPY . .
RUN python -m venv /opt/midspan
RUN /opt/midspan/bin/pip install --no-cache-dir -c constraints.txt -r deploy/docker/broker-requirements.txt
RUN /opt/midspan/bin/pip install --no-cache-dir --no-deps .

FROM python:3.11-slim
COPY --from=build /opt/midspan /opt/midspan
RUN useradd --uid 10001 --no-create-home --home-dir /tmp midspan
USER 10001
ENV HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
EXPOSE 5555 5556 9100
HEALTHCHECK --interval=10s --timeout=3s CMD ["/opt/midspan/bin/python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9100/health', timeout=2)"]
ENTRYPOINT ["/opt/midspan/bin/midspan"]
CMD ["broker", "--edge-endpoint", "tcp://0.0.0.0:5555", "--worker-endpoint", "tcp://0.0.0.0:5556", "--keys", "/keys", "--metrics", "0.0.0.0:9100", "--log-format", "json"]
