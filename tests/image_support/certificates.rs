//! An authority and a certificate for this machine, made by the `openssl` program.

use super::run;

/// `ca.pem`, and `cert.pem` with its `key.pem`.
pub struct Certificates {
    folder: tempfile::TempDir,
}

impl Certificates {
    pub fn new() -> Self {
        let made = Self { folder: super::scratch() };
        let path = |name: &str| made.path(name);
        let (ca, ca_key, request, key) = (path("ca.pem"), path("ca.key"), path("request.pem"), path("key.pem"));
        let fresh = ["-newkey", "rsa:2048", "-nodes", "-keyout"];
        let authority = ["req", "-x509", "-days", "2", "-subj", "/CN=kiln test authority", "-out", &ca];
        run("openssl", &[&authority[..], &fresh, &[&ca_key]].concat());
        run("openssl", &[&["req", "-subj", "/CN=kiln test", "-out", &request][..], &fresh, &[&key]].concat());
        let extensions = "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\n";
        std::fs::write(path("extensions"), extensions).unwrap();
        let sign = ["x509", "-req", "-days", "2", "-CAcreateserial", "-in", &request, "-CA", &ca, "-CAkey", &ca_key];
        run("openssl", &[&sign[..], &["-extfile", &path("extensions"), "-out", &path("cert.pem")]].concat());
        made
    }

    pub fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }
}
