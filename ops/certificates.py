"""Makes the cluster's certificate authority and a node's certificate (see ``ops/tls_files.py``)."""

from __future__ import annotations

import datetime
import ipaddress
import socket
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bridge.tls import TlsFiles
from ops.home import create_secret_file, write_atomically

CA_DAYS: Final = 3650
NODE_DAYS: Final = 800
RENEW_DAYS: Final = 90  # a node certificate with less left is replaced at the next start
CLOCK_SKEW: Final = datetime.timedelta(days=1)


def make_missing(files: TlsFiles, ca_key: Path, host: str) -> None:
    """Make what is missing of a node on ``host``; keep the rest.

    Raises:
        OSError: nothing can be written.
        ValueError, TypeError: what is there is damaged or does not belong together.
    """
    if not Path(files.ca).exists():
        _make_ca(Path(files.ca), ca_key)
    if ca_key.exists() and not _serves(Path(files.certificate), Path(files.key), host):
        _make_node(files, ca_key, host)


def _names(host: str) -> list[x509.GeneralName]:
    """What peers may call this machine; an address also as a name, as OTP looks it up."""
    hosts = dict.fromkeys((host, socket.gethostname(), "localhost", "127.0.0.1"))
    names: list[x509.GeneralName] = []
    for one in hosts:
        names.append(x509.DNSName(one.encode("idna").decode("ascii")))
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(one)))
        except ValueError:
            continue
    return names


def _serves(certificate: Path, key: Path, host: str) -> bool:
    """Whether a node's files are there, good for a while, and for ``host``."""
    if not (certificate.exists() and key.exists()):
        return False
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    left = found.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return left.days >= RENEW_DAYS and host in names.get_values_for_type(x509.DNSName)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(name: str, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode("ascii")


def _make_ca(certificate_file: Path, key_file: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    name = "phalanx cluster authority"
    certificate = (
        _builder(name, CA_DAYS)
        .issuer_name(_name(name))
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    write_atomically(key_file, _pem(key))
    # Last: a start that was cut short in between begins anew.
    create_secret_file(certificate_file, _text(certificate))


def _make_node(files: TlsFiles, ca_key_file: Path, host: str) -> None:
    ca = x509.load_pem_x509_certificate(Path(files.ca).read_bytes())
    ca_key = serialization.load_pem_private_key(ca_key_file.read_bytes(), None)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{ca_key_file} is no elliptic curve key")
    if ca_key.public_key() != ca.public_key():
        raise ValueError(f"{ca_key_file} is not the key of {files.ca}")
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    own_key = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        _builder("phalanx node", NODE_DAYS)
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
        .add_extension(issuer_key, critical=False)
        .add_extension(own_key, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    # Cut short anywhere, there is no certificate, and the pair is made again.
    Path(files.certificate).unlink(missing_ok=True)
    write_atomically(Path(files.key), _pem(key))
    write_atomically(Path(files.certificate), _text(certificate))


def _text(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")
