package config

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"graindisk/test/pki"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestFullFileIsShownWithDefaultsAndWithoutSecrets(t *testing.T) {
	c, err := Load("testdata/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.YAML()
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "testdata/full.golden", got)
	again, err := load(got, c.Source, nil, false)
	if err != nil {
		t.Fatalf("what show prints is refused: %v", err)
	}
	for _, x := range []*Config{c, again} {
		x.Pools["main"].Targets[2].Azure.SAS = ""
	}
	for _, s := range []*S3{c.Pools["main"].Targets[1].S3, again.Pools["main"].Targets[1].S3} {
		s.AccessKeyID, s.SecretAccessKey = "", "" // the one thing that does not come back
	}
	if !reflect.DeepEqual(c, again) {
		t.Errorf("read back from what was shown:\n%+v\nwant\n%+v", again, c)
	}
	asJSON, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	var back struct {
		Tier  struct{ Size string }
		Pools map[string]struct{ Targets []struct{ Name string } }
	}
	if err := json.Unmarshal(asJSON, &back); err != nil || back.Tier.Size != "100GiB" || back.Pools["single"].Targets[0].Name != "0x10" {
		t.Errorf("as JSON: %s, %v", asJSON, err)
	}
}

func TestSecretsDoNotPrint(t *testing.T) {
	c, err := Load("testdata/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	s3 := c.Pools["main"].Targets[1].S3
	if s3.SecretAccessKey != "not-to-be-seen" {
		t.Fatal("the secret was not read")
	}
	asJSON, err := json.Marshal(s3)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{fmt.Sprint(s3), fmt.Sprintf("%v %+v %#v %q", *s3, *s3, *s3, s3.SecretAccessKey), string(asJSON)} {
		if strings.Contains(s, "not-to-be") {
			t.Errorf("printed: %s", s)
		}
	}
}

func TestEveryProblemAtOnceWithItsLine(t *testing.T) {
	_, err := Load("testdata/bad.yaml")
	var ps *Problems
	if !errors.As(err, &ps) {
		t.Fatalf("got %v; want Problems", err)
	}
	var b strings.Builder
	for _, p := range ps.List {
		fmt.Fprintln(&b, p)
	}
	golden(t, "testdata/bad.golden", []byte(b.String()))
	if s := err.Error(); strings.Contains(s, "\n") || !strings.Contains(s, fmt.Sprintf("and %d more", len(ps.List)-1)) {
		t.Errorf("as an error: %q", s)
	}
	if asJSON, err := json.Marshal(ps.List); err != nil || strings.Contains(string(asJSON), "hidden-id") {
		t.Errorf("as JSON: %s, %v", asJSON, err)
	}
}

func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s", path, got, want)
	}
}

// problemsOf loads text and returns its problems, one per line.
func problemsOf(t *testing.T, text string) string {
	t.Helper()
	_, err := load([]byte(text), "test.yaml", os.Environ(), false)
	if err == nil {
		return ""
	}
	var ps *Problems
	if !errors.As(err, &ps) {
		t.Fatalf("got %v; want Problems", err)
	}
	var b strings.Builder
	for _, p := range ps.List {
		fmt.Fprintln(&b, p)
	}
	return b.String()
}

const top = "data: /d\ntier: {size: 1GiB}\n"

func TestBrokenFiles(t *testing.T) {
	long := strings.Repeat("x", 100)
	pool := top + "pools: {main: {targets: [{name: a, local: {dir: /t/a}}]}}\n"
	for _, c := range []struct{ name, text, want string }{
		{"an empty file", "", "data: the data directory is missing\npools: no pool is configured\n"},
		{"only a comment", "# nothing\n", "data: the data directory is missing\npools: no pool is configured\n"},
		{"not YAML", "data: [\n", "line 1: not YAML: did not find expected node content\n"},
		{"a list at the top", "- a\n", "line 1: must be a mapping, not a list\n"},
		{"two documents", pool + "---\ndata: /e\n", "line 4: a second YAML document; only one is read\n"},
		{"an alias", top + "pools: {main: {targets: [&a {name: a, local: {dir: /t}}, *a]}}\n", "line 3: pools.main.targets[1]: YAML aliases are not supported\n"},
		{"a list where a mapping belongs", pool + "listen: [a]\n", "line 4: listen: must be a mapping, not a list\n"},
		{"a mapping where a value belongs", pool + "shutdown_timeout: {a: b}\n", "line 4: shutdown_timeout: must be one value, not a mapping\n"},
		{"a value where a list belongs", pool + "listen: {nbd: unix:///a.sock}\n", "line 4: listen.nbd: must be a list, not a single value\n"},
		{"a zero tier", "data: /d\ntier: {size: 0}\npools: {main: {targets: [{name: a, local: {dir: /t/a}}]}}\n", "line 2: tier.size: must be more than 0\n"},
		{"a key in capitals", "Data: /x\n" + pool, "line 1: Data: unknown key (did you mean data?)\n"},
		{"a pool that says nothing", top + "pools: {main: , other: {}}\n", "line 3: pools.main: is empty\nline 3: pools.other: is empty\n"},
		{"a missing target name at the end", top + "pools: {main: {targets: [{name: a, local: {dir: /t/a}}, {}]}}\n", "line 3: pools.main.targets[1]: is empty\n"},
		{"a parity without data", top + "pools: {main: {stripe: {parity: 1}, targets: [{name: a, local: {dir: /t/a}}]}}\n", "line 3: pools.main.stripe.data: the number of data shards is missing\n"},
		{"a long socket path", pool + "listen: {nbd: ['unix:///" + long + "/n.sock']}\n",
			"line 4: listen.nbd[0].address: \"unix:///" + long + "/n.sock\": socket path /" + long + "/n.sock has 108 bytes, the system allows 107\n"},
		{"a target that holds the data", top + "pools: {main: {targets: [{name: a, local: {dir: /}}]}}\n", "line 3: pools.main.targets[0].local.dir: / holds the data directory /d\n"},
		{"two targets in one directory", top + "pools: {main: {targets: [{name: a, local: {dir: /t/a}}, {name: b, local: {dir: /t/x/../a}}], stripe: {data: 1}}}\n",
			"line 3: pools.main.targets[1].local.dir: /t/a shares files with pools.main.targets[0].local.dir (/t/a)\n"},
		{"two targets in one prefix", top + "pools: {main: {targets: [{name: a, s3: {bucket: bbb, prefix: x}}, {name: b, s3: {bucket: bbb, prefix: x/y}}], stripe: {data: 1}}}\n",
			"line 3: pools.main.targets[1].s3: bucket bbb and prefix \"x/y\" share objects with pools.main.targets[0].s3, prefix \"x\"\n"},
		{"a listener on the admin socket", pool + "listen: {nbd: ['unix:///d/admin.sock']}\n", "line 4: listen.nbd[0].address: \"unix:///d/admin.sock\" is that of the admin socket too\n"},
		{"a store that is missing", top + "pools: {main: {targets: [{name: a}]}}\n", "line 3: pools.main.targets[0]: names no store; it needs s3, azure or local\n"},
		{"two stores in one target", top + "pools: {main: {targets: [{name: a, local: {dir: /t}, azure: {account: x, container: ccc}}]}}\n",
			"line 3: pools.main.targets[0]: names several stores; a target is one of s3, azure and local\n"},
		{"an Azure target that says little", top + "pools: {main: {targets: [{name: a, azure: {endpoint: 'https://u:secret@x'}}]}}\n",
			"line 3: pools.main.targets[0].azure.container: the container is missing\n" +
				"line 3: pools.main.targets[0].azure.endpoint: must be http://host[:port] or https://host[:port]\n" +
				"line 3: pools.main.targets[0].azure.account: the account is missing\n"},
		{"an Azure target with two secrets", top + "pools: {main: {targets: [{name: a, azure: {account: x, container: ccc, sas: secret, account_key: secret}}]}}\n",
			"line 3: pools.main.targets[0].azure: has several of account_key, sas, connection_string and credentials_file; only one of them can be right\n"},
		{"two targets in one container", top + "pools: {main: {targets: [{name: a, azure: {account: x, container: ccc}}, {name: b, azure: {account: x, container: ccc, prefix: y}}], stripe: {data: 1}}}\n",
			"line 3: pools.main.targets[1].azure: container ccc and prefix \"y\" share objects with pools.main.targets[0].azure, prefix \"\"\n"},
		{"bad limits", top + "pools: {main: {targets: [{name: a, local: {dir: /t}, limits: {concurrency: 0, schedule: [{from: '8', to: '25:00'}]}, prices: {out_per_gb: -1}}]}}\n",
			"line 3: pools.main.targets[0].limits.concurrency: \"0\" is not a number from 1 to 1024\n" +
				"line 3: pools.main.targets[0].prices.out_per_gb: \"-1\" is not a number of at least 0\n" +
				"line 3: pools.main.targets[0].limits.schedule[0].from: \"8\" is no time of day such as 08:30\n" +
				"line 3: pools.main.targets[0].limits.schedule[0].to: \"25:00\" is no time of day such as 08:30\n"},
		{"a profile beside keys", top + "pools: {main: {targets: [{name: a, s3: {bucket: bbb, profile: x, access_key_id: i, secret_access_key: s}}]}}\n",
			"line 3: pools.main.targets[0].s3: access_key_id is set as well as a profile; only one of them can be right\n"},
		{"a role that is none", top + "pools: {main: {targets: [{name: a, s3: {bucket: bbb, role_arn: writer, sts_endpoint: 'https://u:secret@x'}}]}}\n",
			"line 3: pools.main.targets[0].s3.role_arn: \"writer\" does not begin with arn:\n" +
				"line 3: pools.main.targets[0].s3.sts_endpoint: must be http://host[:port] or https://host[:port]\n"},
		{"objects that cannot be made so", top + "pools: {main: {targets: [{name: a, s3: {bucket: bbb, multipart_above: 1MiB, storage_class: GLACIER, sse: x, sse_kms_key_id: k, checksum: sha1}}]}}\n",
			"line 3: pools.main.targets[0].s3.multipart_above: must be from 5MiB to 5GiB\n" +
				"line 3: pools.main.targets[0].s3.storage_class: is an archive, from which nothing can be read at once\n" +
				"line 3: pools.main.targets[0].s3.sse: \"x\" is none of AES256, aws:kms, aws:kms:dsse\n" +
				"line 3: pools.main.targets[0].s3.sse_kms_key_id: needs sse: aws:kms or aws:kms:dsse\n" +
				"line 3: pools.main.targets[0].s3.checksum: \"sha1\" is none of crc32c, md5, none\n"},
		{"a session of no role", top + "pools: {main: {targets: [{name: a, s3: {bucket: bbb, role_session_name: x}}]}}\n",
			"line 3: pools.main.targets[0].s3: external_id, role_session_name and sts_endpoint need role_arn\n"},
		{"no credentials file", top + "pools: {main: {targets: [{name: a, s3: {bucket: bbb, credentials_file: /does/not/exist}}]}}\n",
			"line 3: pools.main.targets[0].s3.credentials_file: credentials file: stat /does/not/exist: no such file or directory\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := problemsOf(t, c.text); got != c.want {
				t.Errorf("got\n%swant\n%s", got, c.want)
			}
		})
	}
}

func TestStripesThatClaimTooMuchAreRefused(t *testing.T) {
	for _, c := range []struct {
		targets, witnesses, k, m int
		survives                 int // lost targets; -1 refused
	}{
		{1, 0, 1, 0, 0}, {2, 0, 1, 0, 0}, {3, 0, 2, 1, 1}, {4, 0, 2, 1, 1}, {6, 0, 4, 2, 2}, {5, 0, 3, 2, 2}, {3, 0, 4, 2, 1},
		{4, 0, 4, 2, 1}, {3, 0, 1, 1, 1}, {5, 0, 1, 2, 2}, {3, 0, 2, 2, 1}, {9, 0, 5, 4, 4}, {3, 0, 16, 0, 0},
		{1, 0, 1, 1, -1}, // both copies in one place
		{2, 0, 1, 1, -1}, // no majority of two after a loss
		{2, 0, 2, 1, -1}, // two of three shards in one place
		{4, 0, 2, 2, -1}, // reads after two losses, publishes after one
		{2, 0, 4, 2, -1}, {3, 0, 1, 2, -1}, {5, 0, 4, 1, 1}, {4, 0, 4, 1, -1},

		{2, 1, 1, 1, 1}, {2, 1, 2, 2, 1}, {4, 1, 2, 2, 2}, {3, 1, 2, 1, 1}, {3, 2, 1, 2, 2},
		{1, 2, 1, 0, 0},  // nothing is claimed
		{2, 2, 1, 1, 1},  // four copies of the root, three needed
		{1, 1, 1, 1, -1}, // both copies in one place: a witness has none
		{1, 2, 1, 1, -1}, {2, 1, 2, 1, -1}, {2, 3, 2, 1, -1}, {5, 1, 5, 1, -1},
		{0, 3, 1, 0, -1}, {0, 3, 2, 1, -1}, // no place for data
	} {
		text := top + fmt.Sprintf("pools: {main: {stripe: {data: %d, parity: %d}, targets: [", c.k, c.m)
		for i := range c.targets + c.witnesses {
			text += fmt.Sprintf("{name: t%d, witness: %v, local: {dir: /t/%d}}, ", i, i >= c.targets, i)
		}
		cfg, err := load([]byte(text+"]}}\n"), "test.yaml", nil, false)
		switch {
		case c.survives < 0 && err == nil:
			t.Errorf("%d+%d on %d targets and %d witnesses was accepted", c.k, c.m, c.targets, c.witnesses)
		case c.survives >= 0 && err != nil:
			t.Errorf("%d+%d on %d targets and %d witnesses: %v", c.k, c.m, c.targets, c.witnesses, err)
		case err == nil && cfg.Pools["main"].Survives() != c.survives:
			t.Errorf("%d+%d on %d targets and %d witnesses survives %d; want %d", c.k, c.m, c.targets, c.witnesses, cfg.Pools["main"].Survives(), c.survives)
		}
	}
}

// TestStripesAndWitnesses asks for the words by which a stripe is refused, and for the profile that is chosen.
func TestStripesAndWitnesses(t *testing.T) {
	for _, c := range []struct{ name, pool, want string }{
		{"two targets", "targets: [{name: a, local: {dir: /t/a}}, {name: b, local: {dir: /t/b}}]",
			"stripe: 1+1 on 2 targets would survive the loss of 1, but publishing needs a majority, 2 of 2, and survives the loss of 0 (use 3 targets or more, of which those you add may be \"witness: true\", or less parity)"},
		{"two and a witness", "targets: [{name: a, local: {dir: /t/a}}, {name: b, local: {dir: /t/b}}, {name: w, witness: true, local: {dir: /t/w}}]", "1+1"},
		{"one and two witnesses", "targets: [{name: a, local: {dir: /t/a}}, {name: v, witness: true, local: {dir: /t/v}}, {name: w, witness: true, local: {dir: /t/w}}]", "1+0"},
		{"too few data targets for 1+1", "stripe: {data: 1, parity: 1}, targets: [{name: a, local: {dir: /t/a}}, {name: v, witness: true, local: {dir: /t/v}}, {name: w, witness: true, local: {dir: /t/w}}]",
			"stripe: 1+1 is 2 shards; with 1 target and 2 witnesses one holds 2 of them, and losing it is more than parity 1 rebuilds (1+1 needs 3 targets, of which one may be \"witness: true\")"},
		{"too few data targets for 2+1", "stripe: {data: 2, parity: 1}, targets: [{name: a, local: {dir: /t/a}}, {name: b, local: {dir: /t/b}}, {name: w, witness: true, local: {dir: /t/w}}]",
			"stripe: 2+1 is 3 shards; with 2 targets and 1 witness one holds 2 of them, and losing it is more than parity 1 rebuilds (2+1 needs 3 targets that are no witnesses)"},
		{"too few targets for 4+1", "stripe: {data: 4, parity: 1}, targets: [{name: a, local: {dir: /t/a}}, {name: b, local: {dir: /t/b}}]",
			"stripe: 4+1 is 5 shards; with 2 targets one holds 3 of them, and losing it is more than parity 1 rebuilds (4+1 needs 5 targets)"},
		{"witnesses alone", "targets: [{name: w, witness: true, local: {dir: /t/w}}]", "targets: all targets are witnesses, which hold no data"},
		{"neither true nor false", "targets: [{name: w, witness: 1, local: {dir: /t/w}}]", "targets[0].witness: \"1\" is neither true nor false"},
	} {
		text := top + "pools: {main: {" + c.pool + "}}\n"
		if cfg, err := load([]byte(text), "test.yaml", nil, false); err == nil {
			if got := cfg.Pools["main"].Stripe.String(); got != c.want {
				t.Errorf("%s: accepted, with %s; want %q", c.name, got, c.want)
			}
			continue
		}
		if got, want := problemsOf(t, text), "line 3: pools.main."+c.want+"\n"; got != want {
			t.Errorf("%s: got %q, want %q", c.name, got, want)
		}
	}
	t.Setenv("GATEWAY_POOLS_MAIN_TARGETS_W_WITNESS", "true")
	text := top + "pools: {main: {stripe: {data: 1, parity: 1}, targets: [{name: a, local: {dir: /t/a}}, {name: b, local: {dir: /t/b}}, {name: w, local: {dir: /t/w}}]}}\n"
	cfg, err := load([]byte(text), "test.yaml", os.Environ(), false)
	if err != nil || !cfg.Pools["main"].Targets[2].Witness || cfg.Pools["main"].CountTargets() != "2 targets and 1 witness" {
		t.Errorf("a witness by the environment: %+v, %v", cfg, err)
	}
}

func TestEnvironmentOverridesTheFile(t *testing.T) {
	t.Setenv("GATEWAY_DATA", "/elsewhere")
	t.Setenv("GATEWAY_TIER_SIZE", "7GiB")
	t.Setenv("GATEWAY_SHUTDOWN_TIMEOUT", "9s")
	t.Setenv("GATEWAY_LISTEN_NBD", "unix:///e.sock, tcp://[::1]:10809")
	t.Setenv("GATEWAY_POOLS_MAIN_MAX_DIRTY_AGE", "3s")
	t.Setenv("GATEWAY_POOLS_MAIN_STRIPE_PARITY", "0")
	t.Setenv("GATEWAY_POOLS_MAIN_COMPRESSION", "zstd")
	t.Setenv("GATEWAY_POOLS_MAIN_TARGETS_AWS_S3_BUCKET", "0x10")
	t.Setenv("GATEWAY_POOLS_MAIN_TARGETS_AWS_S3_ACCESS_KEY_ID", "id")
	t.Setenv("GATEWAY_POOLS_MAIN_TARGETS_AWS_S3_SECRET_ACCESS_KEY", "from-env")
	t.Setenv("GATEWAY_POOLS_MAIN_TARGETS_1_S3_PATH_STYLE", "false")
	t.Setenv("GATEWAY_POOLS_MAIN_DISKS_VM1_SIZE", "1TiB")
	t.Setenv("GATEWAY_POOLS_SINGLE_TARGETS_0_S3_PREFIX", "") // empty is as if unset
	t.Setenv("GATEWAY_PORT", "tcp://10.0.0.1:80")            // Kubernetes, for a service "gateway"
	t.Setenv("GATEWAY_SERVICE_HOST", "10.0.0.1")
	c, err := Load("testdata/full.yaml")
	if errors.As(err, new(*Problems)) {
		t.Fatal(problemsOf(t, readFile(t, "testdata/full.yaml")))
	}
	if err != nil {
		t.Fatal(err)
	}
	p := c.Pools["main"]
	for what, ok := range map[string]bool{
		"data":            c.Data == "/elsewhere",
		"tier.size":       c.Tier.Size == 7*GiB,
		"tier.ram kept":   c.Tier.RAM == 512*MiB,
		"shutdown":        c.ShutdownTimeout == 9*time.Second,
		"listeners":       reflect.DeepEqual(c.Listen.NBD, []Listener{{Address: "unix:///e.sock", Ack: AckWritten}, {Address: "tcp://[::1]:10809", Ack: AckStable}}),
		"metrics kept":    c.Listen.Metrics == "127.0.0.1:9809",
		"dirty age":       p.MaxDirtyAge == 3*time.Second,
		"other pool's":    c.Pools["single"].MaxDirtyAge == 30*time.Second,
		"stripe":          p.Stripe == Stripe{2, 0},
		"compression":     p.Compression == CompressionZstd && c.Pools["single"].Compression == CompressionNone,
		"bucket":          p.Targets[0].S3.Bucket == "0x10",
		"secret":          p.Targets[0].S3.SecretAccessKey == "from-env",
		"region kept":     p.Targets[0].S3.Region == "eu-central-1",
		"path style":      !p.Targets[1].S3.PathStyle,
		"other disk kept": p.Disks[1].Size == 5000003584,
		"disk":            p.Disks[0].Size == TiB,
	} {
		if !ok {
			t.Errorf("%s: got %+v", what, c)
		}
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestBadEnvironment(t *testing.T) {
	text := top + "pools: {main: {targets: [{name: a-b, local: {dir: /t/a}}, {name: a.b, local: {dir: /t/b}}], stripe: {data: 1}}}\n"
	for _, c := range []struct{ name, key, value, want string }{
		{"an unknown variable", "GATEWAY_TIER_SIZ", "1", "GATEWAY_TIER_SIZ: unknown environment variable (did you mean GATEWAY_TIER_SIZE?)\n"},
		{"a bad value", "GATEWAY_TIER_SIZE", "big", "GATEWAY_TIER_SIZE: size \"big\": want a whole number and a unit, such as 10GiB\n"},
		{"a value too small", "GATEWAY_TIER_SIZE", "1MiB", "tier.size: 1MiB is less than 512MiB, set by GATEWAY_TIER_SIZE\n"},
		{"a bad codec", "GATEWAY_POOLS_MAIN_COMPRESSION", "lz4", "GATEWAY_POOLS_MAIN_COMPRESSION: \"lz4\" is none of none, s2 and zstd\n"},
		{"a bad list", "GATEWAY_LISTEN_NBD", "unix:///a,b", "GATEWAY_LISTEN_NBD: \"b\": must be unix:///path or tcp://host:port\n"},
		{"two names in one", "GATEWAY_POOLS_MAIN_TARGETS_A_B_LOCAL_DIR", "/x", "GATEWAY_POOLS_MAIN_TARGETS_A_B_LOCAL_DIR: could mean pools.main.targets[0].local.dir or pools.main.targets[1].local.dir (use the element's number)\n"},
		{"a pool that the file has not", "GATEWAY_POOLS_X_MAX_DIRTY_AGE", "3s", "GATEWAY_POOLS_X_MAX_DIRTY_AGE: unknown environment variable (did you mean GATEWAY_POOLS_MAIN_MAX_DIRTY_AGE?)\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv(c.key, c.value)
			if got := problemsOf(t, text); got != c.want {
				t.Errorf("got\n%swant\n%s", got, c.want)
			}
		})
	}
	t.Run("one key twice", func(t *testing.T) {
		t.Setenv("GATEWAY_LISTEN_NBD", "unix:///a")
		t.Setenv("GATEWAY_LISTEN_NBD_0_ADDRESS", "unix:///b")
		got := problemsOf(t, text+"listen: {nbd: ['unix:///c']}\n")
		if want := "GATEWAY_LISTEN_NBD_0_ADDRESS: sets what GATEWAY_LISTEN_NBD sets too\n"; got != want {
			t.Errorf("got\n%swant\n%s", got, want)
		}
	})
}

func TestEmbeddedDefault(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	t.Setenv("GATEWAY_DATA", "/not/this")
	t.Setenv("GATEWAY_TIER_SIZE", "600MiB")
	c, err := Embedded("run", []Disk{{Name: "demo", Size: 10 * GiB}})
	if err != nil {
		t.Fatal(err)
	}
	run := filepath.Join(dir, "run")
	want := &Config{
		Data:            run,
		Listen:          Listen{NBD: []Listener{{Address: "unix://" + run + "/nbd.sock", Ack: AckWritten}}},
		Tier:            Tier{Dir: run + "/tier", Size: 600 * MiB, RAM: 256 * MiB},
		ShutdownTimeout: 45 * time.Second,
		Pools: map[string]Pool{"main": {
			Stripe: Stripe{2, 1}, MaxDirtyAge: 30 * time.Second, Beat: 30 * time.Second, Watch: 75 * time.Second, Compression: CompressionNone,
			ScrubPeriod: 720 * time.Hour, ScrubRate: 32 << 20,
			Targets: []Target{
				{Name: "a", Local: &Local{run + "/targets/a"}}, {Name: "b", Local: &Local{run + "/targets/b"}}, {Name: "c", Local: &Local{run + "/targets/c"}},
			},
			Disks: []Disk{{Name: "demo", Size: 10 * GiB}},
		}},
		Embedded: true, Source: "embedded default",
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got\n%+v\nwant\n%+v", c, want)
	}
	if _, err := os.Stat(run); !os.IsNotExist(err) {
		t.Errorf("reading the configuration made %s: %v", run, err)
	}
	long := "/" + strings.Repeat("x", 110)
	if _, err := Embedded(long, nil); err == nil || !strings.Contains(err.Error(), "shorter data directory") {
		t.Errorf("a data directory too long for its sockets: %v", err)
	}
	if _, err := Embedded("", nil); err == nil {
		t.Error("an empty data directory was accepted")
	}
}

func TestDefaultTierCountsItsOwnSpaceAsFree(t *testing.T) {
	dir := t.TempDir()
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	empty := allocated(dir, st.Dev)
	if err := os.Mkdir(filepath.Join(dir, "tier"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "tier", "slot"), make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := allocated(dir, st.Dev) - empty; got < 4*MiB || got > 5*MiB {
		t.Errorf("a file of 4 MiB occupies %v", got)
	}
	if got := allocated(dir, st.Dev+1); got != 0 {
		t.Errorf("it occupies %v on another file system", got)
	}
	c := &Config{Tier: Tier{Dir: filepath.Join(dir, "not", "yet", "there")}}
	size, err := c.defaultTierSize()
	if err != nil && !strings.Contains(err.Error(), "less than the smallest tier") {
		t.Fatal(err)
	}
	if err == nil && (size < TierSizeMin || size > TierSizeDefaultMax || size%MiB != 0) {
		t.Errorf("default size %v", size)
	}
}

func TestCredentials(t *testing.T) {
	file := filepath.Join(t.TempDir(), "credentials")
	text := "# keys\n[default]\naws_access_key_id = d-id\naws_secret_access_key=d=secret\n\n[other]\nAWS_ACCESS_KEY_ID = o-id\naws_secret_access_key = o\naws_session_token = tok\n[empty]\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		s    S3
		want Credentials
	}{
		{S3{}, Credentials{}},
		{S3{AccessKeyID: "a", SecretAccessKey: "b", SessionToken: "c"}, Credentials{"a", "b", "c"}},
		{S3{CredentialsFile: file}, Credentials{"d-id", "d=secret", ""}},
		{S3{CredentialsFile: file, ConfigFile: file}, Credentials{}}, // the SDK reads both
		{S3{Profile: "other"}, Credentials{}},
		{S3{CredentialsFile: file, Profile: "other"}, Credentials{"o-id", "o", "tok"}},
	} {
		if got, err := c.s.Credentials(); err != nil || got != c.want {
			t.Errorf("%+v: got %q %q %q, %v", c.s, string(got.AccessKeyID), string(got.SecretAccessKey), string(got.SessionToken), err)
		}
	}
	for _, profile := range []string{"empty", "missing"} {
		if _, err := (S3{CredentialsFile: file, Profile: profile}).Credentials(); err == nil {
			t.Errorf("profile %s gave credentials", profile)
		}
	}
}

func TestListenerURIs(t *testing.T) {
	for _, c := range []struct{ listener, addr, want string }{
		{"unix:///srv/d/nbd.sock", "", "nbd+unix:///demo?socket=/srv/d/nbd.sock"},
		{"unix:///a b&c/nbd.sock", "", "nbd+unix:///demo?socket=/a%20b%26c/nbd.sock"},
		{"tcp://127.0.0.1:10809", "", "nbd://127.0.0.1:10809/demo"},
		{"tcp://[::1]:0", "[::1]:40001", "nbd://[::1]:40001/demo"},
	} {
		if got := (Listener{Address: c.listener}).URI("demo", c.addr); got != c.want {
			t.Errorf("%s at %q: %s; want %s", c.listener, c.addr, got, c.want)
		}
	}
}

// FuzzLoad expects no panic, and that what is accepted is accepted again as it is shown.
func FuzzLoad(f *testing.F) {
	for _, path := range []string{"testdata/full.yaml", "testdata/bad.yaml"} {
		text, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte("a: &a [*a]"))
	f.Add([]byte("<<: {data: /x}\n? [a]\n: b"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := load(text, "fuzz", nil, false)
		if err != nil {
			if !errors.As(err, new(*Problems)) {
				t.Fatalf("not a list of problems: %v", err)
			}
			return
		}
		shown, err := c.YAML()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := load(shown, "shown", nil, false); err != nil {
			t.Fatalf("accepted, but not as it is shown: %v\n%s", err, shown)
		}
	})
}

func TestAzureCredentialsFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "azure")
	for text, want := range map[string]AzureCredentials{
		"account_key=a2V5=\n":                                 {AccountKey: "a2V5="},
		"# SAS of the backup\n\n sas = sv=1&sig=x= \n":        {SAS: "sv=1&sig=x="},
		"connection_string=AccountName=a;AccountKey=a2V5=;\n": {ConnectionString: "AccountName=a;AccountKey=a2V5=;"},
		"":            {},
		"topsecret\n": {},
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := (&Azure{CredentialsFile: path}).Credentials()
		if got != want || (err == nil) != (want != AzureCredentials{}) {
			t.Errorf("%q: %#v, %v", text, got, err)
		}
		if err != nil && strings.Contains(err.Error(), "topsecret") {
			t.Errorf("the error tells the secret: %v", err)
		}
	}
}

// tlsText is a file with one listener of every kind of TLS and rules that all can match.
func tlsText(dir string) string {
	return top + fmt.Sprintf(`listen:
  nbd:
    - {address: "tcp://127.0.0.1:1", certificate: %[1]s/server-cert.pem, key: %[1]s/server-key.pem, client_ca: %[1]s/ca-cert.pem, allow: [CN=vm1, DNS=vm1.example]}
    - {address: "tcp://127.0.0.1:2", tls: offer, certificate: %[1]s/server-cert.pem, key: %[1]s/server-key.pem}
    - {address: "unix:///s", tls: off, mode: 0666}
pools:
  main:
    targets: [{name: a, local: {dir: /t/a}}]
    disks: [{name: x, size: 1MiB, allow: ["URI=spiffe://x/y", uid=0, addr=10.0.0.1], allow_read: [any]}]
`, dir)
}

func TestListenersWithTLS(t *testing.T) {
	dir := t.TempDir()
	ca := pki.NewCA(t, "ca")
	ca.Dir(t, dir, "server", ca.Server(t, "x"))
	ca.Dir(t, dir, "client", ca.Client(t, "y"))
	c, err := load([]byte(tlsText(dir)), "test.yaml", nil, false)
	if err != nil {
		t.Fatal(problemsOf(t, tlsText(dir)))
	}
	l := c.Listen.NBD
	if l[0].TLS != TLSRequire || l[1].TLS != TLSOffer || l[2].TLS != TLSOff || l[2].UnixMode() != 0o666 || l[0].UnixMode() != 0o600 {
		t.Errorf("listeners %+v", l)
	}
	if !reflect.DeepEqual(l[0].Allow, []Rule{"CN=vm1", "DNS=vm1.example"}) {
		t.Errorf("rules %q", l[0].Allow)
	}
	if got := l[0].URI("x", ""); got != "nbds://127.0.0.1:1/x" {
		t.Errorf("URI %s", got)
	}
	if got := l[1].URI("x", ""); got != "nbd://127.0.0.1:2/x" { // whoever wants TLS there knows
		t.Errorf("URI %s", got)
	}
	shown, err := c.YAML()
	if err != nil {
		t.Fatal(err)
	}
	again, err := load(shown, "test.yaml", nil, false)
	if err != nil || !reflect.DeepEqual(c, again) {
		t.Errorf("what show prints reads back as %+v, %v", again, err)
	}
	t.Setenv("GATEWAY_POOLS_MAIN_DISKS_X_ALLOW", "CN=a,CN=b")
	if c, err = load([]byte(tlsText(dir)), "test.yaml", os.Environ(), false); err != nil || !reflect.DeepEqual(c.Pools["main"].Disks[0].Allow, []Rule{"CN=a", "CN=b"}) {
		t.Errorf("rules by the environment: %+v, %v", c, err)
	}

	for _, x := range []struct{ name, was, is, want string }{
		{"a key of another certificate", "server-key.pem, client_ca", "client-key.pem, client_ca",
			"line 5: listen.nbd[0].certificate: with key " + dir + "/client-key.pem: tls: private key does not match public key\n"},
		{"no certificate where one should be", "server-cert.pem, key: " + dir + "/server-key.pem}", "none.pem, key: " + dir + "/server-key.pem}",
			"line 6: listen.nbd[1].certificate: with key " + dir + "/server-key.pem: open " + dir + "/none.pem: no such file or directory\n"},
		{"an authority that is none", "client_ca: " + dir + "/ca-cert.pem", "client_ca: " + dir + "/server-key.pem",
			"line 5: listen.nbd[0].client_ca: " + dir + "/server-key.pem holds no certificate\n"},
		{"a relative path", "client_ca: " + dir, "client_ca: .", "line 5: listen.nbd[0].client_ca: \"./ca-cert.pem\" must be an absolute path\n"},
		{"names where no certificate is asked for", ", client_ca: " + dir + "/ca-cert.pem", "",
			"line 5: listen.nbd[0].allow[0]: \"CN=vm1\" can match nobody: it needs a listener with tls and client_ca\n" +
				"line 5: listen.nbd[0].allow[1]: \"DNS=vm1.example\" can match nobody: it needs a listener with tls and client_ca\n" +
				"line 11: pools.main.disks[0].allow[0]: \"URI=spiffe://x/y\" can match nobody: it needs a listener with tls and client_ca\n"},
		{"a certificate and TLS off", "tls: offer", "tls: off",
			"line 6: listen.nbd[1].certificate: is of no use without TLS (set tls: require)\nline 6: listen.nbd[1].key: is of no use without TLS (set tls: require)\n"},
		{"no unix socket for a uid", `    - {address: "unix:///s", tls: off, mode: 0666}` + "\n", "",
			"line 10: pools.main.disks[0].allow[1]: \"uid=0\" can match nobody: it needs a unix socket\n"},
		{"a mode that locks everybody out", "mode: 0666", "mode: 0066", "line 7: listen.nbd[2].mode: \"0066\" is not an octal mode such as 0660 that lets the owner read and write\n"},
	} {
		t.Run(x.name, func(t *testing.T) {
			t.Setenv("GATEWAY_POOLS_MAIN_DISKS_X_ALLOW", "")
			text := strings.Replace(tlsText(dir), x.was, x.is, 1)
			if got := problemsOf(t, text); got != x.want {
				t.Errorf("got\n%swant\n%s", got, x.want)
			}
		})
	}
}
