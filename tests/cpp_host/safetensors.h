// Reading and writing safetensors files: eight bytes with the length of a JSON header, the header, the values.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "json.h"

using Tensors = std::map<std::string, at::Tensor>;

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::stringstream content;
  content << file.rdbuf();
  return content.str();
}

inline at::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> known = {
      {"F64", at::kDouble}, {"F32", at::kFloat},      {"F16", at::kHalf},       {"BF16", at::kBFloat16},
      {"I64", at::kLong},   {"I32", at::kInt},        {"I16", at::kShort},      {"I8", at::kChar},
      {"U8", at::kByte},    {"BOOL", at::kBool},      {"float64", at::kDouble}, {"float32", at::kFloat},
      {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}, {"int64", at::kLong}, {"int32", at::kInt},
      {"int16", at::kShort}, {"int8", at::kChar},     {"uint8", at::kByte},     {"bool", at::kBool}};
  auto found = known.find(name);
  if (found == known.end()) throw std::runtime_error("no dtype is called " + name);
  return found->second;
}

inline std::vector<int64_t> sizes_of(const json::Value& shape) {
  std::vector<int64_t> sizes;
  for (const auto& size : shape.array()) sizes.push_back(size.whole());
  return sizes;
}

inline Tensors load_tensors(const std::string& path) {
  const std::string content = read_file(path);
  uint64_t length = 0;
  if (content.size() < 8) throw std::runtime_error(path + " is no safetensors file");
  std::memcpy(&length, content.data(), 8);
  const std::string text = content.substr(8, length);
  const json::Value header = json::parse(text);
  Tensors found;
  for (const auto& [name, entry] : header.object()) {
    if (name == "__metadata__") continue;
    at::Tensor tensor = at::empty(sizes_of(entry["shape"]), dtype_of(entry["dtype"].text()));
    const auto& place = entry["data_offsets"].array();
    std::memcpy(tensor.data_ptr(), content.data() + 8 + length + place[0].whole(), place[1].whole() - place[0].whole());
    found[name] = tensor;
  }
  return found;
}

// Writes float32 tensors.
inline void save_tensors(const std::string& path, const Tensors& tensors) {
  std::string header = "{";
  std::string data;
  for (const auto& [name, given] : tensors) {
    at::Tensor tensor = given.to(at::kFloat).contiguous();
    std::string shape;
    for (int64_t size : tensor.sizes()) shape += (shape.empty() ? "" : ",") + std::to_string(size);
    const size_t start = data.size();
    data.append(static_cast<const char*>(tensor.data_ptr()), tensor.nbytes());
    header += (header.size() > 1 ? ",\"" : "\"") + name + "\":{\"dtype\":\"F32\",\"shape\":[" + shape +
              "],\"data_offsets\":[" + std::to_string(start) + "," + std::to_string(data.size()) + "]}";
  }
  header += "}";
  const uint64_t length = header.size();
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(&length), 8);
  file << header << data;
  if (!file) throw std::runtime_error("cannot write " + path);
}
