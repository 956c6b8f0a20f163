# Serves a model: docker build -t mlmjax . && docker run -p 127.0.0.1:8000:8000 -e MLMJAX_KEY=... mlmjax
# Another model: docker run ... -v /path/of/model:/model mlmjax --model /model
# An NVIDIA GPU: docker build --build-arg EXTRA=cuda ..., and docker run --gpus all ...
# A TPU VM: docker build --build-arg EXTRA=tpu ..., and docker run --privileged --net host --user root ...
FROM python:3.12-slim
ARG EXTRA=cpu
WORKDIR /app
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY mlmjax mlmjax
COPY configs configs
COPY examples examples
RUN pip install --no-cache-dir ".[serve,$EXTRA]" && useradd --create-home mlmjax
USER mlmjax
EXPOSE 8000
HEALTHCHECK --start-period=5m CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready')"]
ENTRYPOINT ["mlmjax", "serve", "--host", "0.0.0.0", "--api-key-env", "MLMJAX_KEY"]
