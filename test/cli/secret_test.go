package cli

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/sas"

	"graindisk/backend/backendtest/azuritetest"
	"graindisk/backend/backendtest/miniotest"
	"graindisk/backend/backendtest/servertest"
	"graindisk/test/harness"
)

// TestSecretsStaySecret runs a gateway on an S3 bucket and two Azure containers, one by key and one by a signature
// that is part of every URL, all in its configuration, and looks for them in all that it says: log, status, metrics, configuration, errors of a store
// that goes away, arguments of the process, and what it keeps on disk.
func TestSecretsStaySecret(t *testing.T) {
	m, a := miniotest.Start(t), azuritetest.Start(t)
	signed := a.Container(t)
	query := a.SAS(t, signed, sas.ContainerPermissions{Read: true, Write: true, Create: true, Delete: true, List: true}, time.Hour)
	values, err := url.ParseQuery(query)
	if err != nil {
		t.Fatal(err)
	}
	sig := values.Get("sig")
	secrets := []string{miniotest.SecretKey, azuritetest.AccountKey, azuritetest.AccountKey[:40], sig, url.QueryEscape(sig), sig[:12]}
	p := newPlace(t)
	p.targets = append(p.targets[:1], bucketTarget(m.Endpoint, m.Bucket(t), miniotest.SecretKey), fmt.Sprintf(
		"{name: blob, azure: {endpoint: %q, account: %s, container: %s, account_key: %q}}",
		a.Endpoint, azuritetest.Account, a.Container(t), azuritetest.AccountKey), fmt.Sprintf(
		"{name: signed, azure: {endpoint: %q, account: %s, container: %s, sas: %q}}", a.Endpoint, azuritetest.Account, signed, query))
	metrics := servertest.FreeAddress(t)
	p.configure(fmt.Sprintf("listen: {nbd: [%q], metrics: %q}", "unix://"+p.path("nbd.sock"), metrics))
	p.create()
	g := harness.Serve(t, "--config", p.config)
	pid := g.PID()
	said := map[string]string{}
	run := func(args ...string) {
		r := harness.Run(t, append(args, "--config", p.config)...)
		said[strings.Join(args, " ")] = r.Stdout + r.Stderr
	}
	run("disk", "create", "d", "1MiB")
	run("config", "show")
	run("config", "check", "--json")
	run("pool", "check", "--json")
	if !strings.Contains(said["pool check --json"], "it ends at ") {
		t.Error("pool check says nothing of the signature")
	}
	run("pool", "status", "--json")
	for _, file := range []string{"cmdline", "environ"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
		p.must(err)
		said[file] = string(b)
	}
	resp, err := http.Get("http://" + metrics + "/metrics")
	p.must(err)
	b, err := io.ReadAll(resp.Body)
	p.must(err)
	said["metrics"] = string(b)
	if !strings.Contains(said["metrics"], `gateway_target_state{pool="main",target="blob"}`) {
		t.Error("the metrics do not know the target")
	}
	m.Stop(t)
	a.Stop(t)
	run("pool", "check")
	run("disk", "create", "e", "1MiB")
	g.Stop() // without its stores it says so, in an error
	said["log"] = g.Log()
	p.must(filepath.WalkDir(p.dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || path == p.config {
			return err
		}
		b, err := os.ReadFile(path)
		for _, s := range secrets {
			if bytes.Contains(b, []byte(s)) {
				t.Errorf("%s holds a secret", path)
			}
		}
		return err
	}))
	for what, text := range said {
		if text == "" {
			t.Errorf("%s says nothing", what)
		}
		for _, s := range secrets {
			if strings.Contains(text, s) {
				t.Errorf("%s tells a secret:\n%s", what, text)
			}
		}
	}
}
