package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"

	"graindisk/backend"
	"graindisk/backend/adaptive"
)

// pickyBucket refuses whoever has not the key of the moment.
type pickyBucket struct {
	*httptest.Server
	takes    atomic.Pointer[string]
	requests atomic.Int64
}

func newPickyBucket(t *testing.T, takes string) *pickyBucket {
	b := &pickyBucket{}
	b.takes.Store(&takes)
	b.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		b.requests.Add(1)
		if got := credentialOf.FindStringSubmatch(r.Header.Get("Authorization"))[1]; got != *b.takes.Load() {
			answer(403, "InvalidAccessKeyId")(w, r)
			return
		}
		yes(w, r)
	}))
	t.Cleanup(b.Close)
	return b
}

// TestRefusedKeysAreHadAnew rotates the keys wherever they may come from, under 20 callers of each way to the store.
// They notice nothing, and the place is asked once.
func TestRefusedKeysAreHadAnew(t *testing.T) {
	dir := t.TempDir()
	text := func(key string) string {
		return fmt.Sprintf("[default]\naws_access_key_id = %s\naws_secret_access_key = s\n", key)
	}
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	var current, asked atomic.Int64 // which keys are good; how often Keys or the STS was asked
	name := func() string { return fmt.Sprintf("key%d", current.Load()) }
	sts := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		w.Header().Set("Content-Type", "text/xml")
		fmt.Fprintf(w, `<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult><Credentials>`+
			`<AccessKeyId>%s</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>`+
			`<Expiration>%s</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>`,
			name(), time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
	}))
	t.Cleanup(sts.Close)
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"} {
		t.Setenv(name, "")
	}
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", filepath.Join(dir, "chain"))
	process := write("process", "echo run >>"+filepath.Join(dir, "runs")+"\ncat "+filepath.Join(dir, "printed")+"\n")

	for what, c := range map[string]struct {
		o      Options
		rotate func()       // the keys lie there now
		asked  func() int64 // how often
	}{
		"keys": {Options{Keys: func(context.Context) (Keys, error) {
			asked.Add(1)
			return Keys{AccessKey: name(), SecretKey: "s"}, nil
		}}, func() {}, asked.Load},
		"role": {Options{AccessKey: "base", SecretKey: "s", RoleARN: "arn:aws:iam::1:role/writer", STSEndpoint: sts.URL}, func() {}, asked.Load},
		"profile": {Options{Profile: "default", ConfigFile: write("config", ""), CredentialsFile: filepath.Join(dir, "credentials")},
			func() { write("credentials", text(name())) }, nil},
		"profile with a process": {Options{Profile: "default", ConfigFile: write("config2", "[default]\ncredential_process = /bin/sh "+process+"\n"), CredentialsFile: write("none", "")},
			func() {
				write("printed", fmt.Sprintf(`{"Version": 1, "AccessKeyId": %q, "SecretAccessKey": "s"}`, name()))
			}, func() int64 {
				b, _ := os.ReadFile(filepath.Join(dir, "runs")) // 0 before the first
				return int64(strings.Count(string(b), "run"))
			}},
		"the SDK's chain": {Options{}, func() { write("chain", text(name())) }, nil},
	} {
		t.Run(what, func(t *testing.T) {
			current.Store(1)
			c.rotate()
			bucket := newPickyBucket(t, name())
			c.o.Bucket, c.o.Endpoint, c.o.PathStyle, c.o.Attempts = "b", bucket.URL, true, 1
			inner, err := Open(t.Context(), c.o)
			if err != nil {
				t.Fatal(err)
			}
			store := adaptive.New(inner, adaptive.Options{})
			all := func() {
				var wg sync.WaitGroup
				for i := range 20 {
					call := callsOf[[]string{"put if absent", "read"}[i%2]]
					wg.Go(func() {
						if err := call(t.Context(), store); err != nil {
							t.Error(err)
						}
					})
				}
				wg.Wait()
			}
			all()
			before := int64(0)
			if c.asked != nil {
				before = c.asked()
			}
			current.Add(1)
			c.rotate()
			good := name()
			bucket.takes.Store(&good)
			all()
			if c.asked != nil && c.asked() != before+1 {
				t.Errorf("the keys were asked for %d times more", c.asked()-before)
			}
			lost := "lost"
			bucket.takes.Store(&lost) // and nobody has written it down; adaptive asks no more today
			bucket.requests.Store(0)
			for range 3 {
				if err := callsOf["put"](t.Context(), store); !errors.Is(err, backend.ErrAuth) {
					t.Errorf("with keys that are not good: %v", err)
				}
			}
			if n := bucket.requests.Load(); n != 3 {
				t.Errorf("%d requests for three calls that are refused", n)
			}
			if c.asked != nil && c.asked() != before+1 {
				t.Error("the keys were asked for again at once")
			}
			if what == "role" {
				return // has others each time
			}
			if changed, err := inner.Refresh(t.Context()); changed || err != nil {
				t.Errorf("a refresh that finds the same keys: %v, %v", changed, err)
			}
		})
	}
}

// TestRefreshThatFailsKeepsTheKeys loses the place where the keys come from.
func TestRefreshThatFailsKeepsTheKeys(t *testing.T) {
	bucket := newPickyBucket(t, "a")
	gone := errors.New("the file is gone")
	var fails error
	s, err := Open(t.Context(), Options{Bucket: "b", Endpoint: bucket.URL, PathStyle: true, Keys: func(context.Context) (Keys, error) {
		return Keys{AccessKey: "a", SecretKey: "secret"}, fails
	}})
	if err != nil {
		t.Fatal(err)
	}
	fails = gone
	if _, err := s.Stat(t.Context(), "k"); backend.ClassOf(err) != backend.Auth {
		t.Errorf("before there are keys: %v", err)
	}
	fails = nil
	if changed, err := s.Refresh(t.Context()); !changed || err != nil {
		t.Errorf("the first keys: %v, %v", changed, err)
	}
	if _, err := s.Stat(t.Context(), "k"); err != nil {
		t.Error(err)
	}
	fails = gone
	if changed, err := s.Refresh(t.Context()); changed || !errors.Is(err, gone) || strings.Contains(err.Error(), "secret") {
		t.Errorf("without them: %v, %v", changed, err)
	}
	if _, err := s.Stat(t.Context(), "k"); err != nil {
		t.Errorf("the old keys are no longer used: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s.keys.build = func(ctx context.Context) (aws.CredentialsProvider, error) { return nil, ctx.Err() }
	if changed, err := s.Refresh(ctx); changed || !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v, %v", changed, err)
	}
}

// TestKeysThatChangedByThemselves: a call that was signed before may be refused just after, and is worth another.
func TestKeysThatChangedByThemselves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var key string
		k := &keyring{build: func(context.Context) (aws.CredentialsProvider, error) {
			return credentials.NewStaticCredentialsProvider(key, "s", ""), nil
		}}
		use := func(id string) {
			t.Helper()
			key = id
			p, _ := k.build(t.Context())
			k.from.Store(&p)
			if got, err := k.Retrieve(t.Context()); err != nil || got.AccessKeyID != id {
				t.Fatalf("got %v, %v", got.AccessKeyID, err)
			}
		}
		renew := func(when string, want bool) {
			t.Helper()
			if changed, err := k.renew(t.Context()); changed != want || err != nil {
				t.Errorf("%s: %v, %v", when, changed, err)
			}
		}
		use("a")
		renew("the first keys are the same", false)
		use("b")
		time.Sleep(rotationLag - time.Second)
		renew("soon after others came into use", true)
		renew("and again", false)
		use("c")
		time.Sleep(rotationLag)
		renew("long after others came into use", false)
		key = "d"
		renew("others are found", true)
		renew("and again", false)
	})
}
