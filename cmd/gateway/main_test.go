package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"graindisk/config"
	"graindisk/pool"
)

// gatewayRun runs the program in this process.
func gatewayRun(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), args, &out, &errs)
	return code, out.String(), errs.String()
}

func writeFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "gateway.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const (
	goodYAML = "data: /d\ntier: {size: 1GiB}\npools: {main: {targets: [{name: a, local: {dir: /t/a}}]}}\n"
	badYAML  = "data: /d\nteir: {size: 1GiB}\npools: {main: {targets: [{name: a, local: {dir: t}}]}}\n"
)

func TestUsageErrorsAreOneLineAndExitWith2(t *testing.T) {
	t.Setenv("GATEWAY_CONFIG", "")
	t.Setenv("GATEWAY_DATA", "")
	for _, args := range [][]string{
		{"nonsense"},
		{"--nonsense"},
		{"version", "extra"},
		{"version", "--nonsense"},
		{"config"},
		{"config", "nonsense"},
		{"config", "show"},
		{"config", "show", "--data", "/d", "--config", "/c"},
		{"config", "check", "--config", writeFile(t, "data: [")},
		{"attach"},
		{"attach", "nbd+unix:///x?socket=/s", "--device", "nbd0"},
		{"attach", "nbd+unix:///x?socket=/s", "--device", "/dev/nbd01"},
		{"attach", "nbd+unix:///x?socket=/s", "--device", "/dev/sda"},
		{"attach", "nbd+unix:///x?socket=/s", "--block-size", "8192"},
		{"attach", "nbd+unix:///x?socket=/s", "--block-size", "1000"},
		{"attach", "nbd+unix:///x?socket=/s", "--reconnect-delay", "10ms"},
		{"attach", "x"},
		{"detach"},
		{"detach", "/dev/nbd"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			code, stdout, stderr := gatewayRun(t, args...)
			if code != exitUsage || !strings.HasPrefix(stderr, "gateway: ") || strings.Count(stderr, "\n") != 1 {
				t.Errorf("exit %d, stdout %q, stderr %q", code, stdout, stderr)
			}
			code, stdout, stderr = gatewayRun(t, append(args, "--json")...)
			var object map[string]any
			if err := json.Unmarshal([]byte(stdout), &object); err != nil || code != exitUsage || stderr != "" {
				t.Errorf("with --json: exit %d, stdout %q (%v), stderr %q", code, stdout, err, stderr)
			}
		})
	}
}

func TestVersion(t *testing.T) {
	code, stdout, stderr := gatewayRun(t, "version")
	if code != 0 || !strings.HasPrefix(stdout, "gateway ") || stderr != "" {
		t.Errorf("exit %d, stdout %q, stderr %q", code, stdout, stderr)
	}
	code, stdout, _ = gatewayRun(t, "--json", "version")
	var v versionInfo
	if err := json.Unmarshal([]byte(stdout), &v); err != nil || code != 0 || v != buildVersion() {
		t.Errorf("exit %d, stdout %q, %v", code, stdout, err)
	}
}

func TestConfigCheck(t *testing.T) {
	good, bad := writeFile(t, goodYAML), writeFile(t, badYAML)
	code, stdout, stderr := gatewayRun(t, "config", "check", "--config", good)
	want := good + ": no problems\npool main: 1+0, targets: 1, may be lost without loss of data or service: 0\n"
	if code != 0 || stdout != want || stderr != "" {
		t.Errorf("exit %d, stdout %q, stderr %q", code, stdout, stderr)
	}
	code, stdout, stderr = gatewayRun(t, "config", "check", "--config", bad)
	want = "line 2: teir: unknown key (did you mean tier?)\nline 3: pools.main.targets[0].local.dir: \"t\" must be an absolute path\n"
	if code != exitUsage || stdout != want || stderr != "gateway: configuration "+bad+": problems: 2\n" {
		t.Errorf("exit %d, stdout %q, stderr %q", code, stdout, stderr)
	}
	code, stdout, stderr = gatewayRun(t, "config", "check", "--json", "--config", bad)
	var r configReport
	if err := json.Unmarshal([]byte(stdout), &r); err != nil || code != exitUsage || stderr != "" || r.OK || len(r.Problems) != 2 || r.Problems[0].Line != 2 {
		t.Errorf("exit %d, stdout %q (%v), stderr %q", code, stdout, err, stderr)
	}
	t.Setenv("GATEWAY_CONFIG", good)
	if code, stdout, _ := gatewayRun(t, "config", "check"); code != 0 || !strings.HasPrefix(stdout, good) {
		t.Errorf("by GATEWAY_CONFIG: exit %d, stdout %q", code, stdout)
	}
	if code, _, stderr := gatewayRun(t, "config", "check", "--config", "/does/not/exist"); code != exitFailed || !strings.Contains(stderr, "/does/not/exist") {
		t.Errorf("no file: exit %d, stderr %q", code, stderr)
	}
}

func TestConfigShow(t *testing.T) {
	t.Setenv("GATEWAY_TIER_SIZE", "600MiB")
	code, stdout, stderr := gatewayRun(t, "config", "show", "--data", "/d")
	if code != 0 || !strings.Contains(stdout, "size: 600MiB\n") || !strings.Contains(stdout, "dir: /d/targets/c\n") || stderr != "" {
		t.Errorf("exit %d, stdout %q, stderr %q", code, stdout, stderr)
	}
	t.Setenv("GATEWAY_DATA", "/by-env")
	code, stdout, _ = gatewayRun(t, "config", "show", "--json")
	var c struct{ Data string }
	if err := json.Unmarshal([]byte(stdout), &c); err != nil || code != 0 || c.Data != "/by-env" {
		t.Errorf("exit %d, stdout %q, %v", code, stdout, err)
	}
}

func TestAttachFindsTheSocket(t *testing.T) {
	t.Setenv("GATEWAY_TIER_SIZE", "600MiB")
	for where, want := range map[string]string{
		"unix:///a.sock":                      "nbd+unix:///vm1?socket=/a.sock",
		"tcp://127.0.0.1:1,unix:///b.sock":    "nbd+unix:///vm1?socket=/b.sock",
		"tcp://127.0.0.1:1,tcp://127.0.0.1:2": "",
	} {
		t.Setenv("GATEWAY_LISTEN_NBD", where)
		if got, err := attachURI(&app{dataDir: "/d"}, "vm1"); got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v", where, got, err)
		}
	}
	if got, err := attachURI(&app{}, "nbd://host/x"); got != "nbd://host/x" || err != nil {
		t.Errorf("a URI: %q, %v", got, err)
	}
}

func TestDiskFlag(t *testing.T) {
	a := &app{dataDir: t.TempDir()}
	t.Setenv("GATEWAY_TIER_SIZE", "600MiB")
	c, err := a.loadConfig([]string{"demo=10GiB", "x=1MiB"})
	if err != nil || len(c.Pools["main"].Disks) != 2 || !reflect.DeepEqual(c.Pools["main"].Disks[0], config.Disk{Name: "demo", Size: 10 * config.GiB}) {
		t.Errorf("got %+v, %v", c, err)
	}
	for _, disks := range [][]string{{"demo"}, {"demo=1"}, {"demo=1GiB", "demo=1GiB"}} {
		if _, err := a.loadConfig(disks); exitCode(err) != exitUsage {
			t.Errorf("%v: %v", disks, err)
		}
	}
	a = &app{configFile: writeFile(t, goodYAML)}
	if _, err := a.loadConfig([]string{"demo=1GiB"}); exitCode(err) != exitUsage {
		t.Errorf("--disk with a file: %v", err)
	}
}

func TestExitCodes(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("x"), exitFailed},
		{fmt.Errorf("x: %w", usagef("y")), exitUsage},
		{fmt.Errorf("x: %w", &config.Problems{List: []config.Problem{{}}}), exitUsage},
		{fmt.Errorf("x: %w", context.Canceled), exitInterrupted},
		{&reportedError{usagef("y")}, exitUsage},
	} {
		if got := exitCode(c.err); got != c.want {
			t.Errorf("%v: exit %d; want %d", c.err, got, c.want)
		}
	}
	for _, c := range exitCodes {
		if got := exitCode(fmt.Errorf("x: %w", c.err)); got != c.code {
			t.Errorf("%v: exit %d; want %d", c.err, got, c.code)
		}
	}
}

func TestErrorsAreOneLine(t *testing.T) {
	var out, errs bytes.Buffer
	a := &app{stdout: &out, stderr: &errs}
	if code := a.report(errors.Join(errors.New("one"), errors.New("two"))); code != exitFailed || errs.String() != "gateway: one; two\n" {
		t.Errorf("exit %d, %q", code, errs.String())
	}
	a.json = true
	if code := a.report(errors.New("one")); code != exitFailed || out.String() != "{\n  \"error\": \"one\",\n  \"code\": 1\n}\n" {
		t.Errorf("exit %d, %q", code, out.String())
	}
}

func TestStatusCheckFailsOverABound(t *testing.T) {
	good := pool.Status{Name: "good", Exposure: pool.ExposureStatus{BoundAgeSeconds: 90}}
	for name, c := range map[string]struct {
		status pool.Status
		want   string
	}{
		"over in age":   {pool.Status{Name: "p", UnpublishedBytes: 4096, UnpublishedAgeSeconds: 91, Exposure: pool.ExposureStatus{Over: true, BoundAgeSeconds: 90}}, "pool p: 4KiB unpublished, oldest 91 s; the bound is 90 s"},
		"over in bytes": {pool.Status{Name: "p", UnpublishedBytes: 8192, Exposure: pool.ExposureStatus{Over: true, BoundBytes: 8192, BoundAgeSeconds: 90}}, "the bound is 90 s and 8KiB"},
		"stopped":       {pool.Status{Name: "p", Error: "fenced"}, "pool p: fenced"},
	} {
		if err := checkPools([]pool.Status{good, c.status}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	if err := checkPools([]pool.Status{good}); err != nil {
		t.Error(err)
	}
}
