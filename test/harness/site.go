package harness

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"graindisk/backend/backendtest/miniotest"
)

// Site is the configuration of a pool "main" and the tier that it names.
type Site struct{ Config, Tier string }

// NewSite makes a pool of profile 2+1 on three buckets of one server. tier is a size, disks are what goes
// into the configuration's list.
func NewSite(t testing.TB, store *miniotest.Server, tier string, dirtyAge time.Duration, disks string) Site {
	t.Helper()
	dir := t.TempDir()
	s := Site{filepath.Join(dir, "gateway.yaml"), filepath.Join(dir, "tier")}
	var targets strings.Builder
	for i := range 3 {
		fmt.Fprintf(&targets, "      - {name: t%d, s3: {endpoint: %q, bucket: %s, path_style: true, access_key_id: %s, secret_access_key: %s}}\n",
			i, store.Endpoint, store.Bucket(t), miniotest.AccessKey, miniotest.SecretKey)
	}
	text := fmt.Sprintf(`data: %q
tier: {dir: %q, size: %s, ram: 64MiB}
pools:
  main:
    stripe: {data: 2, parity: 1}
    max_dirty_age: %v
    targets:
%s    disks: [%s]
`, filepath.Join(dir, "data"), s.Tier, tier, dirtyAge, targets.String(), disks)
	if err := os.WriteFile(s.Config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	Must(t, Binary(t), "pool", "create", "main", "--config", s.Config)
	return s
}
