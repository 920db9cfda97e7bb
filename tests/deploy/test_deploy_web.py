"""The page in Kubernetes: it is protected, reaches the gateway and nothing else, and its probes ask what answers."""

import pytest
from deploy_manifests import GATEWAY_PORT, KUBERNETES, build, parsed, pods_of, spec_of

from orbithash.search.protocol.address import is_loopback, parse_address
from orbithash.search.web.door.routes import routes


@pytest.fixture
def objects():
    return build(KUBERNETES / "web")


@pytest.fixture
def page(objects):
    (pod,) = pods_of(objects)
    return pod


def test_the_page_is_protected(page):
    options = parsed(page.container("web")["command"])
    assert not is_loopback(parse_address(options["listen"])[0])
    assert options["tls_cert"]
    assert options["tls_key"]
    assert not options["insecure_listen"], "with it, the page would start without a certificate"
    (mount,) = page.container("web")["volumeMounts"]
    (volume,) = page.spec["volumes"]
    files = {f"{mount['mountPath']}/{item['path']}" for item in volume["secret"]["items"]}
    assert {str(options[name]) for name in ("ca", "tls_cert", "tls_key")} == files


def test_the_page_asks_the_gateways_service(page):
    options = parsed(page.container("web")["command"])
    service = next(each for each in build(KUBERNETES / "base") if each["kind"] == "Service")
    assert options["gateway"] == f"{service['metadata']['name']}:{GATEWAY_PORT}"


def test_the_service_finds_the_page_under_its_own_name(objects, page):
    service = next(each for each in objects if each["kind"] == "Service")
    options = parsed(page.container("web")["command"])
    assert options["web_host"] == [service["metadata"]["name"]]
    assert page.is_selected({"matchLabels": service["spec"]["selector"]})
    (port,) = service["spec"]["ports"]
    (opened,) = page.container("web")["ports"]
    assert port["targetPort"] == opened["containerPort"] == parse_address(options["listen"])[1]


def test_the_policies_let_the_page_and_the_gateway_talk(objects, page):
    policy = spec_of(objects, "NetworkPolicy")
    gateway = next(pod for pod in pods_of(build(KUBERNETES / "base")) if "gateway" in pod.name)
    assert page.is_selected(policy["podSelector"])
    (ingress,), (egress,) = policy["ingress"], policy["egress"]
    assert [port["port"] for port in ingress["ports"]] == [
        parse_address(parsed(page.container("web")["command"])["listen"])[1]
    ]
    assert gateway.is_selected(egress["to"][0]["podSelector"])
    assert [port["port"] for port in egress["ports"]] == [GATEWAY_PORT]
    assert page.labels["orbithash-client"] == "true", "the gateway's policy asks for it"


def test_the_probes_ask_for_what_needs_no_gateway_and_no_token(page):
    web = page.container("web")
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = web[name]["httpGet"]
        assert probe["scheme"] == "HTTPS"
        assert probe["path"] == "/api/openapi.json"
        assert probe["port"] == web["ports"][0]["containerPort"]
    assert any(route.path == "/api/openapi.json" for route in routes)


def test_the_deployment_selects_its_pods(objects, page):
    assert page.is_selected(spec_of(objects, "Deployment")["selector"])
